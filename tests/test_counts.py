"""The work of each part, counted exactly at full size without running it: the paper's models, and no waste."""

import math
import weakref
from dataclasses import replace

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counting
from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.ar.guidance import guide
from dar_lightning.ar.sampling import draw_tokens, filter_logits
from dar_lightning.tokenizer.blocks import axial_rotary
from dar_lightning.tokenizer.decoder import PixelDecoder
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer
from dar_lightning.training import TokenizerModule
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import PerceptualLoss, RepaLoss

V1 = TokenizerConfig.preset("v1")
GFLOP = 1e9


def slope(values: dict[float, float]) -> float:
    """Of the logarithms."""
    (x, y), (x2, y2) = values.items()
    return math.log(y2 / y) / math.log(x2 / x)


@pytest.mark.parametrize(
    ("name", "config", "gflop"),
    [
        ("encode", V1, 64.8),
        ("condition", V1, 30.6),
        ("diffusion_step", V1, 332),
        ("decode", V1, 2689),
        ("tokenizer_step", V1, 1294),
        ("tokenizer_step", TokenizerConfig.preset("light"), 457),
    ],
)
def test_the_tokenizer_at_full_size(name, config, gflop):
    assert getattr(counting, name)(config) / GFLOP == pytest.approx(gflop, rel=0.005)


def test_a_training_step_with_the_frozen_networks(vgg_file, monkeypatch):
    """LPIPS sees two images and goes back to the pixels of one; DINOv2 sees one and does not go back.

    Beside a tokenizer of v1's widths and two blocks each, as beside v1, whose step has 1461 with them and 1294 without.
    """
    build = timm.create_model
    random = {"pretrained": False, "weight_init": "skip"}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: build(name, **options | random))
    losses = {"perceptual": PerceptualLoss(weights_path=vgg_file), "repa": RepaLoss()}
    shallow = dict(encoder_depth=2, conditioner_depth=2, decoder_depth=2, repa_layer=1)
    module = TokenizerModule(TokenizerConfig(**V1.to_dict() | shallow), **losses)
    batch = {"image": torch.zeros(2, 3, 256, 256, dtype=torch.uint8)}
    frozen = step_flops(module, batch) / 2 - counting.tokenizer_step(module.tokenizer.config)
    assert frozen / GFLOP == pytest.approx(1461 - 1294, rel=0.01)


def test_ar_training_at_full_size():
    """Without the half of causal attention above the diagonal, which counts in full and fused kernels skip."""
    config = ARConfig.preset("B")  # tests/training/test_flops.py has the other sizes
    assert (counting.ar_step(config) - counting.causal_half(config)) / GFLOP == pytest.approx(153, rel=0.01)


def test_what_grows_with_the_number_of_groups():
    """By K, with the window of K = 8, so that a step is the same one."""
    tiny = TokenizerConfig.preset("tiny").to_dict() | {"tokens_per_step": 4}
    configs = {k: TokenizerConfig(**tiny | {"num_groups": k}) for k in (1, 8)}
    assert slope({k: counting.decode(c) - counting.condition(c) for k, c in configs.items()}) == pytest.approx(1)
    for same in (counting.encode, counting.tokenizer_step):
        assert slope({k: same(config) for k, config in configs.items()}) == 0


def test_a_token_costs_the_same_weights_at_any_position():
    config = ARConfig.preset("B")
    parameters = config.depth * (4 * config.dim**2 + 3 * config.dim * config.ffn_dim) + config.dim * config.vocab_size
    for position in (1, 255):
        attention = config.depth * 4 * config.dim * (position + 1)
        assert counting.ar_token(config, position) - attention == 2 * parameters


def test_sampling_does_not_run_the_repa_head():
    without = TokenizerConfig(**V1.to_dict() | {"repa_layer": None})
    assert counting.diffusion_step(without) == counting.diffusion_step(V1)


@torch.no_grad()
def counted(call) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def test_all_previews_cost_one_decode():
    model = SequentialDiffusionTokenizer(TokenizerConfig.preset("tiny"))
    codes, noise = torch.zeros(2, 32, dtype=torch.long), torch.zeros(2, 3, 64, 64)
    whole = counted(lambda: model.detokenize(codes, noise))
    assert counted(lambda: model.previews(codes, noise)) == whole > 0
    streamed = counted(lambda: list(model.stream(codes.split(1, dim=1), noise)))
    conditions = counted(lambda: model.condition(codes))
    assert whole - conditions < streamed <= whole  # causal attention in parts skips what is above the diagonal


def test_encoding_builds_no_distance_matrix_that_training_would_go_back_through():
    """The search is the only product with the whole codebook, and training has it once, as encoding has."""
    small = TokenizerConfig.preset("tiny")
    large = TokenizerConfig(**small.to_dict() | {"codebook_size": 16384})
    grown = counting.tokenizer_step(large) - counting.tokenizer_step(small)
    assert grown == counting.encode(large) - counting.encode(small)


def test_the_decoders_residual_stream_lies_patch_by_patch():
    """A stream that lies channel by channel would make every norm and product copy it."""
    model, seen = SequentialDiffusionTokenizer(TokenizerConfig.preset("tiny")), []
    for block in model.decoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.decoder(torch.zeros(2, 3, 64, 64), torch.zeros(2), torch.zeros(2, 8, 64))
    assert len(seen) == 2
    assert all(x.is_contiguous() for x in seen)


def test_norms_of_heads_copy_nothing():
    """torch makes what LayerNorm reads contiguous: heads lie last in memory, beside their channels."""
    block, seen = PixelDecoder(replace(TokenizerConfig.preset("tiny"), decoder_dim=128)).blocks[0], []
    for attention in (block.attention, block.cross_attention):
        for norm in (attention.q_norm, attention.k_norm):
            norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    block(torch.randn(1, 4, 128), torch.randn(1, 1, 128), torch.randn(1, 3, 128), axial_rotary(2, 2, 64))
    assert seen == [True] * 4


def test_recomputation_is_off_unless_asked_for():
    model = TokenizerModule(preset="tiny").tokenizer
    assert [part.recompute for part in (model.encoder, model.conditioner, model.decoder)] == [False] * 3


def test_no_token_waits_for_the_host():
    """Tensors without values can give none to the host: drawing on them would fail where it asked for one."""
    with FakeTensorMode(), torch.no_grad():
        ar = ARModel(ARConfig.preset("tiny")).eval()
        logits, cache = ar.start(torch.zeros(4, dtype=torch.long), torch.zeros(4, 0, dtype=torch.long))
        keys = torch.zeros(2, 2, 2, dtype=torch.int32)
        for position in range(2):
            tokens = draw_tokens(filter_logits(guide(logits, 3.0) / 0.9, top_k=5, top_p=0.9), keys[:, position])
            logits = ar.step(tokens.repeat(2), cache)
        assert tokens.shape == (2,)


class Held(TorchDispatchMode):
    """Bytes of all tensors that operations have made and nobody has let go of, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self.let_go, key, tensor.untyped_storage().nbytes())
        return result

    def let_go(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def test_the_quantizer_holds_no_more_for_a_larger_codebook():
    """Beyond the codebook's own size: its unit vectors. 4096 tokens and 65536 codes have 1 GB of products."""
    extra = {}
    for size in (4096, 65536):
        quantizer, latents = VectorQuantizer(size, 8), torch.randn(16, 256, 8, requires_grad=True)
        with Held() as held:
            quantized, _, losses = quantizer(latents)
            (quantized.sum() + losses["vq"].mean() + losses["commit"].mean()).backward()
        extra[size] = held.peak - 2 * 4 * 8 * size  # unit vectors and their squares, and then gradients
    assert extra[65536] < 1.3 * extra[4096]
    assert extra[65536] < 2e7
