"""CUDA kernels of a token and of a diffusion step, counted without a GPU."""

import re
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dar_lightning import ARConfig, ARModel, TokenizerConfig
from dar_lightning.ar import decode_step
from dar_lightning.ar.decode_step import DecodeStep, Plan
from dar_lightning.ar.draw import draw_tokens, filter_logits
from dar_lightning.ar.guidance import guide
from dar_lightning.tokenizer import diffusion_step
from dar_lightning.tokenizer.decoder import PixelDecoder

H200 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, warp_size=32)
RUN = re.compile(r"^ +(?:\w+ = )?(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.\w+\.\w+\.default)\(", re.MULTILINE)


class Kernels(TorchDispatchMode):
    """Counts operations that start a kernel: all that make or change a tensor, without views and bare memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = function.overloadpacket.__name__, function(*args, **kwargs or {})
        memory = function.is_view or name in ("_unsafe_view", "lift_fresh") or "empty" in name
        self.count += not memory and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))
        return result


class OneAttention(TorchFunctionMode):
    """torch's attention as the one kernel that it is on CUDA."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return args[0].clone()
        return function(*args, **kwargs or {})


def fake_cuda() -> ExitStack:
    """Within it, tensors are of CUDA and have no values, and no driver is asked."""
    stack = ExitStack()
    stack.enter_context(mock.patch("torch.cuda._lazy_init"))
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(torch.no_grad())
    return stack


def make_model(config: ARConfig | TokenizerConfig) -> nn.Module:
    """An AR model, or a pixel decoder, with bfloat16 weights, on the device of `fake_cuda`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return (ARModel if isinstance(config, ARConfig) else PixelDecoder)(config).eval()
    finally:
        torch.set_default_dtype(before)


def of_calls(config: ARConfig, rows: int) -> int:
    """Kernels of a guided token where the model is called, and its cache grows."""
    with fake_cuda():
        ar = make_model(config)
        labels = torch.zeros(2 * rows, dtype=torch.long, device="cuda")
        _, cache = ar.start(labels, labels.new_empty(2 * rows, 0))
        keys = torch.zeros(rows, 2, dtype=torch.int32, device="cuda")
        with OneAttention(), Kernels() as kernels:
            logits = guide(ar.step(labels[:rows].repeat(2), cache), 2.0)
            draw_tokens(filter_logits(logits / 1.0, 0, 1.0), keys)
    return kernels.count


def make_step(config: ARConfig, rows: int) -> DecodeStep:
    """Of a guided drawing on the device of `fake_cuda`."""
    return DecodeStep(make_model(config), Plan(rows, True, 1, 0, False, torch.bfloat16, True))


def of_graph(config: ARConfig, rows: int) -> int:
    """Kernels of a guided token in the graph of `ar.decode_step`, as Inductor compiles it."""
    kernels = inductor_kernels(config, rows)
    return sum(kernels.values()) + (config.depth - 1) * kernels["_layer"]


def inductor_kernels(config: ARConfig, rows: int) -> Counter[str]:
    """Kernels of each compiled function of a step; of blocks, which are alike, those of one."""
    found = Counter()

    def compiled(function):
        def count(graph: torch.fx.GraphModule, inputs: list, **_):
            view_to_reshape(graph)
            post_grad_passes(graph, is_inference=True)
            lowering = GraphLowering(graph)
            with V.set_graph_handler(lowering), DebugContext():
                lowering.run(*inputs)
                code, _ = lowering.codegen()
            call = code.value.split("async_compile.wait", 1)[1].split("def benchmark", 1)[0]
            found[function.__name__] = len(RUN.findall(call))
            return graph.forward

        def backend(graph, inputs):
            return compile_fx(graph, inputs, inner_compile=count)

        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    one = ARConfig(**config.to_dict() | {"depth": 1})
    with fake_cuda() as stack:
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", return_value=""))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)))
        named = SimpleNamespace(name="H200", **H200._asdict())
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", return_value=named))
        stack.enter_context(mock.patch("torch.cuda.current_device", return_value=0))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=H200))
        stack.enter_context(mock.patch.object(decode_step, "_compiled", compiled))
        step = make_step(one, rows)
        step.step(True, step.capacity, compiled=True)
    return found


def of_diffusion_step(config: TokenizerConfig, rows: int) -> int:
    """Kernels of a step of the pixel decoder with the solver's update, of bfloat16 weights: the graph's of one step."""
    with fake_cuda():
        decoder = make_model(config)
        trajectory = diffusion_step.Trajectory((0.0, 0.5, 1.0), (0, 0), config.window, config.num_tokens, "adams2")
        shape = rows, 3, config.image_size, config.image_size
        plan = diffusion_step.Plan(trajectory, shape, config.conditioner_dim, torch.bfloat16, None, ())
        step = diffusion_step.DiffusionStep(decoder, plan, torch.device("cuda"))
        with OneAttention(), Kernels() as kernels:
            step.step()
    return kernels.count
