"""FLOPs of a training step against closed forms; counting leaves everything as it was."""

import pytest
import torch
from tiny_models import AR, SIZE, TOKENIZER, TOKENS
from torch._subclasses.fake_tensor import FakeTensorMode

from dar_lightning.ar.config import ARConfig
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import ARModule, TokenizerModule
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import AdversarialLoss, PerceptualLoss

IMAGES = {"image": torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), "label": torch.zeros(4, dtype=torch.long)}


def ar_flops(config: ARConfig) -> int:
    """Per layer and token 2 per weight, and 4 D for each of N / 2 keys; the backward pass is twice that."""
    dim, tokens = config.dim, config.num_tokens
    per_layer = 2 * (4 * dim**2 + 3 * dim * config.ffn_dim) + 4 * tokens // 2 * dim
    return 3 * tokens * (config.depth * per_layer + 2 * dim * config.vocab_size)


def test_the_ar_model_in_closed_form():
    batch = {"label": torch.zeros(5, dtype=torch.long), "codes": torch.zeros(5, TOKENS, dtype=torch.long)}
    assert step_flops(ARModule(ARConfig(**AR)), batch) == 5 * ar_flops(ARConfig(**AR))


@pytest.mark.parametrize(("size", "gflop"), [("B", 153), ("L", 509), ("XL", 1174), ("XXL", 2155)])
def test_the_ar_sizes_of_the_paper(size, gflop):
    """What docs and recipes say, of one sequence."""
    assert ar_flops(ARConfig.preset(size)) / 1e9 == pytest.approx(gflop, rel=0.005)


class Aligned:
    """In the place of REPA: its projection is computed, and no teacher."""

    weight, start_step, grid = 0.5, 0, 16

    def has_started(self, step: int) -> bool:
        return True

    def __call__(self, projected, images, t):
        return projected.mean()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "gflop"), [("light", 457), ("v1", 1294)])
def test_the_tokenizers_of_the_paper(size, gflop):
    """What docs and recipes say, of one image."""
    image = {"image": torch.zeros(1, 3, 256, 256, dtype=torch.uint8), "label": torch.zeros(1, dtype=torch.long)}
    with FakeTensorMode():
        module = TokenizerModule(preset=size)
        module.repa = Aligned()
    assert step_flops(module, image) / 1e9 == pytest.approx(gflop, rel=0.005)


def test_lpips_in_closed_form(vgg_file):
    """VGG16 over both images, and back to the pixels of one; 1x1 heads over the features, and back."""
    sides, widths = (32, 16, 8, 4, 2), (64, 128, 256, 512, 512)
    depths, channels, convolutions, heads = (2, 2, 3, 3, 3), 3, 0, 0
    for side, width, depth in zip(sides, widths, depths, strict=True):
        for _ in range(depth):
            convolutions += 2 * 9 * channels * width * side**2
            channels = width
        heads += 2 * width * side**2
    plain = step_flops(TokenizerModule(TokenizerConfig(**TOKENIZER)), IMAGES)
    for stride in (1, 4):
        loss = PerceptualLoss(weights_path=vgg_file, stride=stride, start_step=100)
        found = step_flops(TokenizerModule(TokenizerConfig(**TOKENIZER), perceptual=loss), IMAGES)
        assert found - plain == 4 // stride * (3 * convolutions + 2 * heads)
        assert loss.start_step == 100


def test_counting_changes_nothing(vgg_file):
    options = dict(perceptual=PerceptualLoss(weights_path=vgg_file), adversarial=AdversarialLoss(channels=4, depth=1))
    module = TokenizerModule(TokenizerConfig(**TOKENIZER | {"latent_norm": "batch"}), **options)
    vgg = module.perceptual.distance.network
    before = {name: tensor.clone() for name, tensor in (module.state_dict() | vgg.state_dict()).items()}
    state = torch.get_rng_state()
    assert step_flops(module, IMAGES) == step_flops(module, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    after = module.state_dict() | vgg.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in module.parameters())
