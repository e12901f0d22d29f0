"""Kernels and memory traffic of a compiled training step, counted, and the MFU that these allow.

python benchmarks/traffic.py [--models v1 B L XL] [--output benchmarks/results/traffic.json]

Counted are a forward and a backward pass under autocast to bfloat16: those of each kind of block, times how many there
are, and of an AR model its head and loss, which are not compiled. Left out are the optimizer, frozen networks, and what
stands before and after the blocks of the tokenizer. Inductor's scheduler says what its fused kernels read and write; it
is asked for a CPU, where its rules of fusion are nearly those for a GPU. What is not compiled reads its inputs and
writes its outputs once. Products are matrix products and attention.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, record_original_output_strides
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import RESULTS, options, record
from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.tokenizer.blocks import axial_rotary

# An H100's peak; what large products and streams of memory are taken to reach.
PEAK, PRODUCTS, STREAMED = 989e12, 600e12, 0.85
MEMORY = STREAMED * 3.35e12
GFLOP = {"v1": 1294, "B": 153, "L": 509, "XL": 1174}  # of a sample: tests/test_counts.py, tests/training/test_flops.py
BATCH = {"v1": 16, "B": 64, "L": 64, "XL": 32}  # of the recipes
PRODUCT_OPS = ("mm", "addmm", "bmm", "_scaled_dot_product", "convolution")
VIEWS = ["view", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"]
VIEWS += ["split", "split_with_sizes", "unbind", "as_strided", "detach", "alias", "_reshape_alias", "view_as_real"]
VIEWS += ["view_as_complex", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"]


class Operations(TorchDispatchMode):
    """Kernels, and bytes that those outside of products read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.kernels += 1
            if not name.startswith(PRODUCT_OPS):
                tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
                self.bytes += sum(tensor.nbytes for tensor in tensors)
        return made


class Planned:
    """A backend that lets Inductor plan its kernels, computes without them, and adds up what they read and write."""

    def __init__(self):
        self.kernels = self.bytes = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list):
        return compile_fx(module, inputs, inner_compile=self.plan)

    def plan(self, module: torch.fx.GraphModule, inputs: list, **_) -> Callable:
        record_original_output_strides(module)
        graph, shapes = GraphLowering(module, example_inputs=inputs), detect_fake_mode(inputs)
        with V.set_graph_handler(graph), V.set_fake_mode(shapes), DebugContext():
            graph.run(*inputs)
            graph._update_scheduler()
            nodes = [node for node in graph.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
            self.kernels += len(nodes)
            fused = [node for node in nodes if not isinstance(node, ExternKernelSchedulerNode)]
            self.bytes += sum(node.get_read_write_buffers_sizes() for node in fused)
        return make_boxed_func(module.forward)


def uncompiled(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Kernels and bytes outside of products of a forward and a backward pass."""
    with Operations() as counted:
        run(call)
    return counted.kernels, counted.bytes


def compiled(call: Callable[[], Tensor]) -> tuple[int, int]:
    """The same of the kernels that Inductor makes."""
    torch._dynamo.reset()
    run(torch.compile(call, backend=(counted := Planned()), dynamic=False))
    return counted.kernels, counted.bytes


def run(call: Callable[[], Tensor]) -> None:
    """Forward and backward pass."""
    with torch.autocast("cpu", torch.bfloat16):
        out = call()
    out.float().sum().backward()


def stream(count: int, length: int, dim: int) -> Tensor:
    """The residual stream (count, length, dim), which gets a gradient."""
    return torch.randn(count, length, dim, requires_grad=True)


def tokenizer_parts(config: TokenizerConfig, count: int) -> Iterator[tuple[int, Callable[[], Tensor], bool]]:
    """How many blocks of a kind there are, a call of one with `count` images, and whether it is compiled."""
    with torch.device("meta"):
        model = SequentialDiffusionTokenizer(config)
    side, tokens = config.image_size // config.encoder_patch_size, config.num_tokens
    length = side**2 + tokens
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    rotary = axial_rotary(side, side, config.head_dim, tokens)
    x = stream(count, length, config.encoder_dim)
    yield config.encoder_depth, bind(model.encoder.blocks[0], x, rotary, mask), True
    mask, x = torch.ones(tokens, tokens, dtype=torch.bool).tril(), stream(count, tokens, config.conditioner_dim)
    yield config.conditioner_depth, bind(model.conditioner.blocks[0], x, None, mask), True
    side = config.image_size // config.decoder_patch_size
    x = torch.randn(count, side**2, config.decoder_dim, dtype=torch.bfloat16, requires_grad=True)
    given = torch.randn(count, 1, config.decoder_dim), stream(count, config.window, config.decoder_dim)
    yield (
        config.decoder_depth,
        bind(model.decoder.blocks[0], x, *given, axial_rotary(side, side, config.head_dim)),
        True,
    )


def ar_parts(config: ARConfig, count: int) -> Iterator[tuple[int, Callable[[], Tensor], bool]]:
    """The same of an AR model."""
    with torch.device("meta"):
        model = ARModel(config).train()
    x = stream(count, config.num_tokens, config.dim)
    yield config.depth, bind(model.blocks[0], x, model.tables()["rotary"], None, None, 0), True
    head, codes = filled(model.head), torch.zeros(count * config.num_tokens, dtype=torch.long)
    yield 1, lambda: F.cross_entropy(head(x).float().flatten(0, 1), codes), False


def filled(module: nn.Module) -> nn.Module:
    """A module of the meta device with memory of its own."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


def bind(block: nn.Module, *inputs) -> Callable[[], Tensor]:
    """A call of a block."""
    filled(block)
    return lambda: block(*inputs)


def measure(name: str) -> dict:
    """A model's row."""
    config = TokenizerConfig.preset(name) if name == "v1" else ARConfig.preset(name)
    parts = tokenizer_parts if name == "v1" else ar_parts
    kernels, read = 0, []
    for count in (1, 2):  # what grows with the batch, and what does not
        found = [(n, (compiled if fuses else uncompiled)(call)) for n, call, fuses in parts(config, count)]
        kernels = sum(n * kernels for n, (kernels, _) in found)
        read.append(sum(n * size for n, (_, size) in found))
    bytes_of_step = read[0] + (BATCH[name] - 1) * (read[1] - read[0])
    flops = BATCH[name] * GFLOP[name] * 1e9
    seconds = flops / PRODUCTS, bytes_of_step / MEMORY
    return {
        "model": name,
        "batch": BATCH[name],
        "kernels": kernels,
        "gigabytes_outside_products": round(bytes_of_step / 1e9, 1),
        "products_ms": round(1e3 * seconds[0], 1),
        "traffic_ms": round(1e3 * seconds[1], 1),
        "mfu_allowed": round(flops / PEAK / sum(seconds), 3),
    }


if __name__ == "__main__":
    given = options(__doc__, models=["v1", "B", "L", "XL"], output=str(RESULTS / "traffic.json"))
    torch.set_num_threads(1)
    rows = map(measure, given.models)
    facts = {"peak_flops": PEAK, "products_flops": PRODUCTS, "memory_bytes": MEMORY}
    record(Path(given.output), "compiled training steps, counted; MFU allowed by them on an H100", rows, **facts)
