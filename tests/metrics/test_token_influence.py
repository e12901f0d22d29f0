"""Token influence of decoders whose images are known by heart, so that every PSNR has a closed form."""

import math
from types import SimpleNamespace

import pytest
import torch

from dar_lightning.metrics.token_influence import token_influence, token_influence_names

GROUPS, TOKENS, SIDE = 8, 16, 4
ALIKE = 10 * math.log10(255**2 * 3 * SIDE**2)  # of identical images


def levels(distance: float) -> float:
    """PSNR of images that are this many of 255 levels apart, everywhere."""
    return 20 * math.log10(255 / distance)


def decoder(brightness) -> SimpleNamespace:
    """A tokenizer whose image has one level from 0 to 255, a function of tokens (B, N) and noise (B, 3, H, W)."""

    def detokenize(codes, noise, solver, num_steps):
        assert (solver, num_steps) == ("euler", 5)
        return (brightness(codes, noise) / 127.5 - 1)[:, None, None, None].expand_as(noise)

    def draw_noise(batch, generators, size):
        return torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])

    return SimpleNamespace(config=SimpleNamespace(num_groups=GROUPS), detokenize=detokenize, draw_noise=draw_noise)


def influence(brightness) -> dict[str, list[float]]:
    """Of two images, all of level 100 and 90, with tokens of ones and of threes."""
    images = torch.tensor([100, 90], dtype=torch.uint8)[:, None, None, None].expand(2, 3, SIDE, SIDE)
    codes = torch.tensor([1, 3])[:, None].expand(2, TOKENS)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    found = token_influence(decoder(brightness), images, codes, codes.flip(0), generators, "euler", 5)
    return dict(zip(token_influence_names(GROUPS), found.T.tolist(), strict=True))


def test_tokens_alone_decide():
    """Level 2 for each token's value: own images have 32 and 96; two levels differ for each token exchanged."""
    found = influence(lambda codes, noise: 2.0 * codes.sum(dim=1))
    expected = {
        "psnr_own_tokens": [levels(100 - 32), levels(96 - 90)],
        "psnr_other_tokens": [levels(100 - 96), levels(90 - 32)],
        "psnr_same_tokens": [ALIKE, ALIKE],
        "psnr_exchanged_from_group_1": [levels(4 * 16)] * 2,
        "psnr_exchanged_from_group_2": [levels(4 * 14)] * 2,
        "psnr_exchanged_from_group_5": [levels(4 * 8)] * 2,
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


def test_noise_alone_decides():
    found = influence(lambda codes, noise: 120 + 40 * noise.mean(dim=(1, 2, 3)).clamp(-2, 2))
    for m in (1, 2, 5):
        assert found[f"psnr_exchanged_from_group_{m}"] == pytest.approx([ALIKE] * 2, rel=1e-5)
    assert found["psnr_own_tokens"] == found["psnr_other_tokens"]
    for seed, same in zip((4, 5), found["psnr_same_tokens"], strict=True):
        generator = torch.Generator().manual_seed(seed)
        first, second = (torch.randn(3, SIDE, SIDE, generator=generator).mean() for _ in range(2))
        distance = abs(round(120 + 40 * float(first)) - round(120 + 40 * float(second)))
        assert distance > 0
        assert same == pytest.approx(levels(distance), rel=1e-5)


@pytest.mark.parametrize(
    ("num_groups", "groups"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 3]), (16, [1, 2, 9])]
)
def test_the_groups_that_are_exchanged(num_groups, groups):
    assert token_influence_names(num_groups)[3:] == [f"psnr_exchanged_from_group_{m}" for m in groups]
