"""PSNR and SSIM against their definitions in numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dar_lightning.metrics.reconstruction import reconstruction_metrics


def images(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4, generator=generator), size=32, mode="bicubic")
    original = (original.clamp(0, 1) * 255).round()
    strength = torch.linspace(2, 30, n).view(-1, 1, 1, 1)
    noisy = (original + strength * torch.randn(original.shape, generator=generator)).round().clamp(0, 255)
    return noisy.to(torch.uint8), original.to(torch.uint8)


def measured(noisy: torch.Tensor, original: torch.Tensor, batch_size: int) -> dict[str, float]:
    metrics = reconstruction_metrics()
    for start in range(0, len(noisy), batch_size):
        part = slice(start, start + batch_size)
        metrics.update(noisy[part].float(), original[part].float())
    return {name: value.item() for name, value in metrics.compute().items()}


def numpy_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al., 2004, on one channel; the window reaches over the border into the mirrored image."""

    def blur(x):
        return gaussian_filter(x, sigma=1.5, truncate=5 / 1.5, mode="mirror")

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


@pytest.mark.parametrize("batch_size", [6, 4])
def test_against_numpy(batch_size):
    noisy, original = images()
    a, b = noisy.double().numpy(), original.double().numpy()
    values = measured(noisy, original, batch_size)
    psnr = [10 * np.log10(255**2 / np.mean((x - y) ** 2)) for x, y in zip(a, b, strict=True)]
    assert values["psnr"] == pytest.approx(np.mean(psnr), rel=1e-5)
    ssim = [numpy_ssim(x[c], y[c]) for x, y in zip(a, b, strict=True) for c in range(3)]
    assert values["ssim"] == pytest.approx(np.mean(ssim), abs=1e-5)
