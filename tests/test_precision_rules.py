"""What a GPU would compute in which dtype: traced on tensors without data that claim to lie on one.

CUDA's autocast has other rules than a CPU's, which hides what it would show: there alone, cross_entropy of bfloat16
logits stays bfloat16, and norms are float32. Values are shown on the CPU.
"""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import AR, TOKENIZER, make_tokenizer, picture, write_images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.ar.guidance import guide
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.sampling import draw_tokens, filter_logits
from dar_lightning.commands.extract import extract
from dar_lightning.layers import rotate
from dar_lightning.metrics.features import FrozenNetwork
from dar_lightning.tokenizer.blocks import axial_rotary
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer
from dar_lightning.training import AblationModule, ARModule, TokenizerModule
from dar_lightning.training.fsdp import mixed_precision, shard, whole
from dar_lightning.training.losses import PerceptualLoss, RepaLoss
from dar_lightning.training.optim import OptimizerConfig, configure_adamw

BF16, F32 = torch.bfloat16, torch.float32
BATCH = 2


class Trace(TorchDispatchMode):
    """Notes each operation that runs, with the tensors it takes, after autocast; and what is allowed of products."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, list[Tensor]]] = []
        self.allowed: set[tuple[str, str]] = set()  # what a GPU may make of float32 products

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self.calls.append((func.overloadpacket.__name__, given))
        if func.overloadpacket.__name__ in ("mm", "bmm"):
            backends = torch.backends.cuda, torch.backends.mkldnn
            self.allowed.add(tuple(backend.matmul.fp32_precision for backend in backends))
        return func(*args, **(kwargs or {}))

    def dtypes(self, *names: str) -> set[torch.dtype]:
        """Of all floating-point tensors that operations of these names took; of all operations, without names."""
        taken = [tensor for name, given in self.calls if name in names or not names for tensor in given]
        return {tensor.dtype for tensor in taken if tensor.is_floating_point()}


@contextmanager
def fake_cuda(autocast: bool = True):
    """Tensors made here have no data; torch.autocast itself would be off for a GPU that is not there."""
    torch.set_autocast_dtype("cuda", BF16)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", autocast)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


def on_fake_cuda(module: nn.Module, dtype: torch.dtype = F32) -> nn.Module:
    """Weights and tables as if moved there; Module.to cannot do it with tensors that have no data."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            part.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return module


def streams(**parts: nn.Module) -> dict[str, set[torch.dtype]]:
    """Filled, when they run, by the dtypes of the residual stream before each part's blocks and after the last."""
    found: dict[str, set[torch.dtype]] = {name: set() for name in parts}
    for name, part in parts.items():
        for block in part.blocks:
            block.register_forward_pre_hook(lambda _, given, name=name: found[name].add(given[0].dtype))
        block.register_forward_hook(lambda _, given, out, name=name: found[name].add(out.dtype))
    return found


def token_batch(count: int = BATCH) -> dict[str, Tensor]:
    codes = torch.zeros(count, AR["num_tokens"], dtype=torch.long)
    return {"label": torch.zeros(count, dtype=torch.long), "codes": codes, "valid": torch.ones(count, dtype=torch.bool)}


def traced_adamw(model: nn.Module) -> set[torch.dtype]:
    """Dtypes that AdamW's update takes, and those of its state."""
    optimizer = configure_adamw(model, OptimizerConfig(lr=1e-3), 10)["optimizer"]
    with Trace() as trace:
        optimizer.step()
    found = trace.dtypes("_fused_adamw_")
    assert found
    return found | {value.dtype for state in optimizer.state.values() for value in state.values()}


# ---- the training of the AR model


@pytest.mark.parametrize("kind", [ARModule, AblationModule])
def test_a_training_step_of_the_ar_model(kind):
    """Of bfloat16 logits, CUDA's autocast takes log-softmax in bfloat16: a fresh loss of 9.6875 for 9.7041 at 16,384
    codes. Norms are float32, and so are their results: products cast what they read themselves."""
    with fake_cuda():
        module = on_fake_cuda(kind(ARConfig(**AR))).train()
        found, norms = streams(ar=module.ar), []
        for layer in module.modules():
            if isinstance(layer, nn.RMSNorm):
                layer.register_forward_hook(lambda _, given, result: norms.append((given[0].dtype, result.dtype)))
        with Trace() as trace:
            module.training_step(token_batch(), 0)
        assert trace.dtypes("_log_softmax") == {F32}
        assert trace.dtypes("mm") == {BF16}, "the head's product among them"
        assert trace.dtypes("rms_norm", "_fused_rms_norm", "pow", "rsqrt", "mean") == {F32}
        assert norms == [(F32, F32)] * (2 * AR["depth"] + 1)
        assert found["ar"] == {F32}
        for parameter in module.parameters():  # what autograd gives a parameter has its dtype
            parameter.grad = torch.empty_like(parameter)
        assert traced_adamw(module) == {F32}


@pytest.mark.parametrize("kind", [ARModule, AblationModule])
def test_validation_of_any_weights_takes_log_softmax_in_float32(kind, monkeypatch):
    """Without autocast nothing is cast but by us, on a CPU as on a GPU."""
    module = kind(ARConfig(**AR)).to(BF16).eval()
    monkeypatch.setattr(module, "log_dict", lambda *args, **options: None)
    with Trace() as trace, torch.no_grad():
        module.validation_step(token_batch(), 0)
    assert trace.dtypes("_log_softmax") == {F32}


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_gradients_are_as_exact_as_whole_ones(mesh):
    """bf16-mixed: norms gathered as bfloat16 would add 14% to the error, embeddings the stream that they start.

    The blocks' matrices are gathered as bfloat16; slices, gradients and moments stay float32.
    """
    base = ARModel(ARConfig(**AR | {"dim": 64, "depth": 8})).eval()
    torch.manual_seed(0)
    for parameter in base.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    labels, codes = torch.randint(4, (32,)), torch.randint(AR["vocab_size"], (32, AR["num_tokens"]))

    def gradient(model: ARModel, precise: bool) -> Tensor:
        with torch.autocast("cpu", BF16, enabled=not precise), Trace() as trace:
            F.cross_entropy(model(labels, codes).flatten(0, 1), codes.flatten()).backward()
        assert precise or BF16 in trace.dtypes("mm")
        assert {parameter.grad.dtype for parameter in model.parameters()} == {F32}
        return torch.cat([whole(parameter.grad).flatten() for parameter in model.parameters()])

    exact = gradient(copy.deepcopy(base), precise=True)
    errors = {}
    for name in ("one device", "sharded"):
        model = copy.deepcopy(base)
        if name == "sharded":
            shard(model, mesh, mixed_precision())
        found = streams(ar=model)
        errors[name] = ((gradient(model, precise=False) - exact).norm() / exact.norm()).item()
        assert found["ar"] == {F32}, name
        assert traced_adamw(model) == {F32}
    assert errors["sharded"] == pytest.approx(errors["one device"], rel=0.01)


# ---- rotary positions


@pytest.mark.parametrize("autocast", [False, True])
def test_rotation_is_in_float32_on_a_gpu(autocast):
    with fake_cuda(autocast):
        x, rotary = torch.zeros(BATCH, 3, 16, 8, dtype=BF16), axial_rotary(4, 4, 8)
        with Trace() as trace:
            turned = rotate(x, rotary)
        assert turned.dtype == BF16
        assert trace.dtypes("mul", "sub", "add", "stack", "cat", "view_as_complex") == {F32}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bfloat16_rotation_is_off_by_its_own_rounding_alone(compiled):
    """Angles rounded to bfloat16 would be off by up to 0.002, sums of rounded products by more."""
    function = torch.compile(rotate, backend="eager", fullgraph=True) if compiled else rotate
    rotary = axial_rotary(16, 16, 64)
    x = torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(0))

    def exactly(x: Tensor) -> Tensor:
        (cos, sin), (even, odd) = rotary.double().unbind(-1), x.double().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    turned, exact = function(x.to(BF16), rotary), exactly(x.to(BF16))
    assert turned.dtype == BF16
    assert ((turned.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    assert (function(x, rotary) - exactly(x)).abs().max() < 1e-5


# ---- the residual streams, norms and losses of the tokenizer


@pytest.fixture
def losses(at_the_root_with_a_random_teacher, monkeypatch) -> dict:
    """LPIPS and REPA, of random weights."""
    monkeypatch.setattr("dar_lightning.metrics.lpips._load", lambda vgg, path: None)
    monkeypatch.setattr(FrozenNetwork, "__call__", lambda self, *inputs: on_fake_cuda(self.network)(*inputs))
    # Without the stride, whose random number an int() would ask of a tensor without data.
    monkeypatch.setattr(PerceptualLoss, "__call__", lambda self, one, other, t: self.mean(self.distance(one, other), t))
    return {"perceptual": PerceptualLoss(weights_path="random"), "repa": RepaLoss()}


def test_a_training_step_of_the_tokenizer(losses):
    """Dtypes by CUDA's autocast; the products of the search for codes are apart, below."""
    config = TokenizerConfig(**TOKENIZER | {"repa_layer": 1, "decoder_depth": 2, "conditioner_depth": 2})
    with fake_cuda():
        module = on_fake_cuda(TokenizerModule(config, **losses)).train()
        found = streams(**{name: getattr(module.tokenizer, name) for name in ("encoder", "conditioner", "decoder")})
        with Trace() as trace:
            step = module.training_step({"image": torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8)}, 0)
        # the conditioner's from the first sum, of token and position, on
        assert found == {"encoder": {F32}, "conditioner": {F32}, "decoder": {BF16}}
        assert trace.dtypes("native_layer_norm", "linalg_vector_norm", "pow") == {F32}
        assert {part.dtype for part in step["parts"].values()} == {step["flow_each"].dtype} == {F32}
        assert step["parts"].keys() == {"flow", "vq", "commit", "perceptual", "repa", "loss"}


def test_perceptual_loss_and_alignment(losses):
    """VGG16 in bfloat16, features compared in float32 by the heads, and nothing dropped; the teacher likewise."""
    with fake_cuda():
        with Trace() as trace:
            value = losses["perceptual"](*torch.zeros(2, BATCH, 3, 32, 32), torch.zeros(BATCH))
        products = [given for name, given in trace.calls if name == "convolution"]
        heads = [given for given in products if given[1].shape[0] == 1]
        assert (len(products), len(heads)) == (2 * 13 + 5, 5)
        assert {tensor.dtype for given in heads for tensor in given} == {F32}
        assert {given[0].dtype for given in products if given[1].shape[0] > 1} == {BF16}
        assert not {"native_dropout", "bernoulli", "bernoulli_"} & {name for name, _ in trace.calls}
        assert value.dtype == F32

        projected, images = torch.zeros(BATCH, 256, 768, dtype=BF16), torch.zeros(BATCH, 3, 32, 32)
        with Trace() as trace:
            value = losses["repa"](projected, images, torch.zeros(BATCH))
        assert BF16 in trace.dtypes("addmm", "convolution"), "the teacher"
        assert trace.dtypes("native_layer_norm", "linalg_vector_norm", "div", "sum") == {F32}
        assert value.dtype == F32


# ---- the nearest code


@pytest.mark.parametrize(("how", "size"), [("old", 1024), ("new", 1024), ("old", 64)])
def test_codes_are_searched_in_exact_float32(how, size):
    """Under autocast, of bfloat16 latents, and with TF32 allowed by either of torch's settings."""
    parts = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [part.fp32_precision for part in parts]
    try:
        if how == "old":
            torch.set_float32_matmul_precision("medium")
        else:
            for part in parts:
                part.fp32_precision = "tf32"
        allowed = [part.fp32_precision for part in parts]
        assert "ieee" not in allowed
        with fake_cuda():
            quantizer = VectorQuantizer(size, 4)
            with Trace() as trace:
                quantizer(torch.zeros(BATCH, 8, 4, dtype=BF16))
        assert trace.dtypes("mm", "bmm", "max", "argmax", "amax", "linalg_vector_norm") == {F32}
        assert trace.allowed == {("ieee", "ieee")}
        assert [part.fp32_precision for part in parts] == allowed, "the run's own again"
    finally:
        torch.set_float32_matmul_precision("highest")
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


def test_tokens_are_extracted_with_float32_weights(tmp_path):
    """Also from a tokenizer that is stored in bfloat16, which computes in it everywhere else."""
    half = make_tokenizer(codebook_size=1024).to(BF16)
    half.save_pretrained(tmp_path / "tokenizer")
    shards = write_images(tmp_path / "images", 12)
    extract(str(tmp_path / "tokenizer"), shards, str(tmp_path / "tokens"), crops="center", accelerator="cpu", devices=1)
    found = load_file(tmp_path / "tokens" / "000000.safetensors")["codes"][:, 0].long()
    images = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) for i in range(12)]) / 127.5 - 1
    rounded = half.tokenize(images)
    assert torch.equal(found, half.float().tokenize(images))
    assert not torch.equal(found, rounded), "the computation of the stored dtype would show"


# ---- drawing tokens


@pytest.mark.parametrize("weights", [BF16, F32], ids=["bfloat16 weights", "autocast"])
def test_drawing_is_in_float32_from_the_head_on(weights):
    with fake_cuda(autocast=weights == F32):
        ar = on_fake_cuda(ARModel(ARConfig(**AR)), weights).eval()
        found = streams(ar=ar)
        labels, codes = torch.zeros(2 * BATCH, dtype=torch.long), torch.zeros(2 * BATCH, 3, dtype=torch.long)
        with torch.no_grad():
            first, cache = ar.start(labels, codes)
            logits = [first, ar.step(codes[:, 0], cache), ar(labels, codes)[:, 0]]
        assert {each.dtype for each in logits} == {F32}
        assert found["ar"] == {weights}
        assert cache.buffer.dtype == BF16
        keys = draw_keys(BATCH, 1, None, torch.device("cuda"))[:, 0]
        with Trace() as trace:
            draw_tokens(filter_logits(guide(logits[0], 3.0) / 0.9, top_k=5, top_p=0.9), keys)
        assert trace.dtypes() == {F32}
        assert {"_softmax", "sort", "topk", "log1p_"} & {name for name, _ in trace.calls}


def test_greedy_is_the_first_of_equal_logits():
    """A bfloat16 head's largest logit has an equal in some rows; no key decides between them."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 5.0, 4.0]])
    for seed in range(20):
        keys = draw_keys(3, 1, torch.Generator().manual_seed(seed), torch.device("cpu"))[:, 0]
        assert draw_tokens(filter_logits(logits, 1, 1.0), keys).tolist() == [1, 0, 2]


# ---- the flow at sampling


@pytest.mark.parametrize(("weights", "prediction"), [(BF16, "velocity"), (F32, "image"), (BF16, "image")], ids=str)
def test_the_state_of_the_flow_is_float32(weights, prediction):
    with fake_cuda(autocast=weights == F32):
        config = TokenizerConfig(**TOKENIZER, prediction=prediction)
        model = on_fake_cuda(SequentialDiffusionTokenizer(config), weights)
        noise, codes = model.draw_noise(BATCH), torch.zeros(BATCH, 8, dtype=torch.long)
        assert noise.dtype == F32
        states = []
        model.decoder.register_forward_hook(lambda _, given, velocity: states.extend((given[0], velocity)))
        conds = ((group, model.conditioner(model.quantizer.lookup(codes))) for group in range(1, 5))
        with torch.no_grad(), Trace() as trace:
            previews = list(model._integrate(conds, noise.to(BF16), "adams2", None))
        assert {tensor.dtype for tensor in (*states, *previews)} == {F32}
        assert trace.dtypes("convolution") == {BF16}


def test_small_steps_of_bfloat16_weights_are_not_lost():
    """A constant velocity of 2^-9 moves noise by as much; in bfloat16, numbers near 1 lie 2^-8 and more apart."""
    model = make_tokenizer().to(BF16)
    nn.init.zeros_(model.decoder.conv_out.weight)
    nn.init.constant_(model.decoder.conv_out.bias, 2**-9)
    noise = model.draw_noise(BATCH, torch.Generator().manual_seed(0))
    images = model.detokenize(torch.zeros(BATCH, 8, dtype=torch.long), noise, num_steps=16)
    torch.testing.assert_close(images, (noise + 2**-9) / model.config.data_std, rtol=1e-6, atol=1e-6)
