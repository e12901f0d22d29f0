"""The work of each part, counted exactly at full size without running it: the paper's models, and no waste."""

import math
import weakref

import pytest
import torch
from tiny_models import write_vgg
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counting
from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.guidance import guide
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.sampling import draw_tokens, filter_logits
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer
from dar_lightning.training import TokenizerModule
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import PerceptualLoss, RepaLoss
from dar_lightning.training.losses import repa as repa_file

V1 = TokenizerConfig.preset("v1")
GFLOP = 1e9


def slope(values: dict[float, float]) -> float:
    """Of the logarithms, between the first and the last."""
    (x, y), *_, (x2, y2) = values.items()
    return math.log(y2 / y) / math.log(x2 / x)


# ---- full size


@pytest.mark.parametrize(
    ("flops", "gflop"),
    [
        (lambda: counting.encode(V1), 64.8),
        (lambda: counting.condition(V1), 30.6),
        (lambda: counting.diffusion_step(V1), 332),
        (lambda: counting.decode(V1), 2689),
        (lambda: counting.tokenizer_step(V1), 1294),
    ],
    ids=["encode", "condition", "diffusion step", "decode", "training step"],
)
def test_the_tokenizer_at_full_size(flops, gflop):
    assert flops() / GFLOP == pytest.approx(gflop, rel=0.01)


def test_a_training_step_with_the_frozen_networks(tmp_path, monkeypatch):
    """LPIPS sees two images and goes back to the pixels of one; DINOv2 sees one and does not go back."""
    build = repa_file.timm.create_model
    monkeypatch.setattr(
        repa_file.timm, "create_model", lambda name, **options: build(name, **options | {"pretrained": False})
    )
    perceptual = PerceptualLoss(weights_path=str(write_vgg(tmp_path / "vgg16.pth")))
    module = TokenizerModule(V1, perceptual=perceptual, repa=RepaLoss())
    batch = {"image": torch.zeros(2, 3, 256, 256, dtype=torch.uint8)}
    assert step_flops(module, batch) / 2 / GFLOP == pytest.approx(1461, rel=0.01)


def test_ar_training_at_full_size():
    """Without the half of causal attention above the diagonal, which counts in full and fused kernels skip."""
    config = ARConfig.preset("B")  # tests/training/test_flops.py has the other sizes
    assert (counting.ar_step(config) - counting.causal_half(config)) / GFLOP == pytest.approx(153, rel=0.01)


# ---- growth


def shallow(**changes) -> TokenizerConfig:
    """v1's width, two blocks a part."""
    return TokenizerConfig(encoder_depth=2, conditioner_depth=2, decoder_depth=2, repa_layer=None, **changes)


def test_a_diffusion_step_grows_with_the_image_as_its_patches_do():
    """Twice the side is four times the patches; attention among them, 12% of the work at 256, grows sixteenfold."""
    sides = {side: counting.diffusion_step(shallow(image_size=side)) for side in (64, 128, 256)}
    assert 1.9 < slope(sides) < 2.2
    linear = {side: flops - self_attention(shallow(), side) for side, flops in sides.items()}
    assert linear[256] - linear[128] == 4 * (linear[128] - linear[64])  # what is left is the tokens' own


def self_attention(config: TokenizerConfig, side: int) -> int:
    """Of the pixel decoder's patches among each other."""
    patches = (side // config.decoder_patch_size) ** 2
    return config.decoder_depth * 4 * patches**2 * config.decoder_dim


def test_a_diffusion_step_hardly_sees_how_many_tokens_it_reads():
    """The tokens' own layers grow with them; the patches, which are many more, do not."""
    tokens = {n: counting.diffusion_step(shallow(tokens_per_step=n)) for n in (16, 32, 64, 128, 256)}
    assert 0 < slope(tokens) < 0.1
    per_token = {n: tokens[n] - tokens[16] for n in (32, 64, 128)}
    assert per_token[64] == 3 * per_token[32]
    assert per_token[128] == 7 * per_token[32]


def groups(flops) -> dict[int, int]:
    """By K, with the window of K = 8, so that a step is the same one."""
    config = TokenizerConfig.preset("tiny").to_dict() | {"tokens_per_step": 4}
    return {k: flops(TokenizerConfig(**config | {"num_groups": k})) for k in (1, 2, 4, 8)}


def test_what_grows_with_the_number_of_groups():
    decoding = groups(lambda config: counting.decode(config) - counting.condition(config))
    assert slope(decoding) == pytest.approx(1)
    assert slope(groups(counting.encode)) == 0
    assert slope(groups(counting.tokenizer_step)) == 0


def test_a_token_costs_the_same_weights_at_any_position():
    config = ARConfig.preset("B")
    work = {position: counting.ar_token(config, position) for position in (1, 15, 255)}
    attention = {position: config.depth * 4 * config.dim * (position + 1) for position in work}
    weights = {position: work[position] - attention[position] for position in work}
    assert slope(weights) == 0
    parameters = config.depth * (4 * config.dim**2 + 3 * config.dim * config.ffn_dim) + config.dim * config.vocab_size
    assert weights[255] == 2 * parameters


# ---- no waste


def test_sampling_does_not_run_the_repa_head():
    with_head = TokenizerConfig(**shallow().to_dict() | {"repa_layer": 1})
    assert counting.diffusion_step(with_head) == counting.diffusion_step(shallow())


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


def test_recomputation_is_off_unless_asked_for():
    config = shallow()
    again = counting.tokenizer_step(config, recompute=True) - counting.tokenizer_step(config)
    assert again == pytest.approx(counting.diffusion_step(config), rel=0.02)
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
            quantized, _, vq, commit = quantizer(latents)
            (quantized.sum() + vq.mean() + commit.mean()).backward()
        extra[size] = held.peak - 2 * 4 * 8 * size  # unit vectors and their squares, and then gradients
    assert extra[65536] < 1.3 * extra[4096]
    assert extra[65536] < 2e7
