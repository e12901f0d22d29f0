"""PSNR and SSIM against their definitions in numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dar_lightning.metrics.reconstruction import mean_scores, reconstruction_scores


def images(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
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


def test_against_numpy():
    noisy, original = images()
    pairs = list(zip(noisy.double().numpy(), original.double().numpy(), strict=True))
    scores = [reconstruction_scores(*part) for part in zip(noisy.split(4), original.split(4), strict=True)]
    psnr = [10 * np.log10(255**2 / np.mean((x - y) ** 2)) for x, y in pairs]
    ssim = [np.mean([numpy_ssim(x[c], y[c]) for c in range(3)]) for x, y in pairs]
    for name, expected in (("psnr", psnr), ("ssim", ssim)):
        assert torch.cat([score[name] for score in scores]).tolist() == pytest.approx(expected, rel=1e-4), "each image"
        assert mean_scores(scores)[name] == pytest.approx(np.mean(expected), rel=1e-5)
    identical = reconstruction_scores(original, original)
    assert mean_scores([identical, *scores]) == {"psnr": None, "ssim": pytest.approx((1 + np.mean(ssim)) / 2)}
