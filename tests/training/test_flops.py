"""FLOPs of a training step against closed forms; counting leaves everything as it was."""

import copy

import pytest
import torch
from tiny_models import AR, SIZE, TOKENIZER, TOKENS

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.training import ARModule, TokenizerModule
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import AdversarialLoss

IMAGES = {"image": torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8), "label": torch.zeros(4, dtype=torch.long)}


def ar_flops(config: ARConfig) -> int:
    """Per layer and token 2 per weight, and 4 D for each of N / 2 keys; the backward pass is twice that."""
    dim, tokens = config.dim, config.num_tokens
    per_layer = 2 * (4 * dim**2 + 3 * dim * config.ffn_dim) + 4 * tokens // 2 * dim
    return 3 * tokens * (config.depth * per_layer + 2 * dim * config.vocab_size)


@pytest.mark.parametrize("backbone", ["llama", "transformers"])
def test_the_ar_model_in_closed_form(backbone):
    """A language model of transformers in the same sizes has the same products."""
    batch = {"label": torch.zeros(5, dtype=torch.long), "codes": torch.zeros(5, TOKENS, dtype=torch.long)}
    other = {}
    if backbone == "transformers":
        pytest.importorskip("transformers")
        options = {"model_type": "qwen3"}
        other = dict(residual_dropout=0.0, ffn_dropout=0.0, backbone=backbone, backbone_options=options)
    assert step_flops(ARModule(ARConfig(**AR | other)), batch) == 5 * ar_flops(ARConfig(**AR))


@pytest.mark.parametrize(("size", "gflop"), [("B", 153), ("L", 509), ("XL", 1174), ("XXL", 2155)])
def test_the_ar_sizes_of_the_paper(size, gflop):
    """What docs and recipes say, of one sequence; tests/test_counts.py has the tokenizers."""
    assert ar_flops(ARConfig.preset(size)) / 1e9 == pytest.approx(gflop, rel=0.005)


def test_lpips_in_closed_form(perceptual):
    """VGG16 over both images, and back to the pixels of one; 1x1 heads over the features, and back."""
    sides, widths, depths = (32, 16, 8, 4, 2), (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
    inputs = (3, *widths[:-1])
    kernels = [n * (first + (depth - 1) * n) for first, n, depth in zip(inputs, widths, depths, strict=True)]
    convolutions = sum(2 * 9 * kernel * side**2 for kernel, side in zip(kernels, sides, strict=True))
    heads = sum(2 * width * side**2 for width, side in zip(widths, sides, strict=True))
    plain = step_flops(TokenizerModule(TokenizerConfig(**TOKENIZER)), IMAGES)
    for stride in (1, 4):
        loss = copy.copy(perceptual)
        loss.stride, loss.start_step = stride, 100
        found = step_flops(TokenizerModule(TokenizerConfig(**TOKENIZER), perceptual=loss), IMAGES)
        assert found - plain == 4 // stride * (3 * convolutions + 2 * heads)
        assert loss.start_step == 100


def test_counting_changes_nothing(perceptual):
    options = dict(perceptual=perceptual, adversarial=AdversarialLoss(channels=4, depth=1))
    module = TokenizerModule(TokenizerConfig(**TOKENIZER | {"latent_norm": "batch"}), **options)
    vgg = module.perceptual.distance.network
    before = {name: tensor.clone() for name, tensor in (module.state_dict() | vgg.state_dict()).items()}
    state = torch.get_rng_state()
    assert step_flops(module, IMAGES) == step_flops(module, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    after = module.state_dict() | vgg.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in module.parameters())
