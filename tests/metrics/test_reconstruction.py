"""PSNR and SSIM against numpy and scipy, token influence by closed forms, spectra of images whose spectrum is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dar_lightning.metrics.reconstruction import (
    mean_scores,
    radial_spectrum,
    reconstruction_scores,
    token_influence,
    token_influence_names,
)


def pairs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=generator), size=32, mode="bicubic")
    original = (original.clamp(0, 1) * 255).round()
    strength = torch.linspace(2, 30, n).view(-1, 1, 1, 1)
    noisy = (original + strength * torch.randn(original.shape, generator=generator)).round().clamp(0, 255)
    return noisy.to(torch.uint8), original.to(torch.uint8)


def numpy_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al., 2004, on one channel; the window reaches over the border into the mirrored image."""

    def blur(x):
        return gaussian_filter(x, sigma=1.5, truncate=5 / 1.5, mode="mirror")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def test_scores_against_numpy():
    noisy, original = pairs()
    both = list(zip(noisy.double().numpy(), original.double().numpy(), strict=True))
    scores = [reconstruction_scores(*part) for part in zip(noisy.split(4), original.split(4), strict=True)]
    psnr = [10 * np.log10(255**2 / np.mean((x - y) ** 2)) for x, y in both]
    ssim = [np.mean([numpy_ssim(x[c], y[c]) for c in range(3)]) for x, y in both]
    for name, expected in (("psnr", psnr), ("ssim", ssim)):
        assert torch.cat([score[name] for score in scores]).tolist() == pytest.approx(expected, rel=1e-4), "each image"
        assert mean_scores(scores)[name] == pytest.approx(np.mean(expected), rel=1e-5)
    identical = reconstruction_scores(original, original)
    assert mean_scores([identical, *scores]) == {"psnr": None, "ssim": pytest.approx((1 + np.mean(ssim)) / 2)}


GROUPS, TOKENS, SIDE = 8, 16, 4
ALIKE = 10 * math.log10(255**2 * 3 * SIDE**2)  # of identical images


def levels(distance: float) -> float:
    """PSNR of images that are this many of 255 levels apart, everywhere."""
    return 20 * math.log10(255 / distance)


def influence(brightness) -> dict[str, list[float]]:
    """Of images of level 100 and 90, with tokens of ones and of threes, each decoded to one level everywhere.

    The level, from 0 to 255, is a function of tokens (B, N) and noise (B, 3, H, W).
    """

    def detokenize(codes, noise, solver, num_steps):
        assert (solver, num_steps) == ("euler", 5)
        return (brightness(codes, noise) / 127.5 - 1)[:, None, None, None].expand_as(noise)

    def draw_noise(batch, generators, size):
        return torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])

    tokenizer = SimpleNamespace(config=SimpleNamespace(num_groups=GROUPS), detokenize=detokenize, draw_noise=draw_noise)
    images = torch.tensor([100, 90], dtype=torch.uint8)[:, None, None, None].expand(2, 3, SIDE, SIDE)
    codes = torch.tensor([1, 3])[:, None].expand(2, TOKENS)
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    found = token_influence(tokenizer, images, codes, codes.flip(0), generators, "euler", 5)
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


def test_the_groups_that_are_exchanged():
    for num_groups, groups in ((1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 3]), (16, [1, 2, 9])):
        assert token_influence_names(num_groups)[3:] == [f"psnr_exchanged_from_group_{m}" for m in groups]


def test_white_noise_is_flat():
    noise = 2 * torch.randn(500, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(radial_spectrum(noise).mean(dim=0)[1:], torch.tensor(4.0), rtol=0.03)


@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.6, 0.8)])
def test_a_wave_is_at_its_frequency(direction):
    cycles, size = 10, 64
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = 2 * math.pi * cycles / size * (direction[0] * rows + direction[1] * columns)
    spectrum = radial_spectrum(5.0 + phase.cos().expand(3, size, size))
    assert spectrum.shape == (32,)
    assert spectrum.argmax() == cycles - 1, "it starts at one cycle"
    assert spectrum[cycles - 3 : cycles + 2].sum() > 0.99 * spectrum.sum()
