"""The figures of benchmarks/editing.py on images whose values are known."""

import pytest
import torch

from benchmarks.editing import correlation, holes, psnr, seam


def test_figures_have_the_values_of_simple_images():
    known = holes(64)["center"][0]
    assert [parts[0].float().mean().item() for parts in holes(64).values()] == [0.75, 0.5, 0.25]
    noise = 0.2 * torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam(noise, known) == pytest.approx(1, abs=0.02)
    ramp = torch.arange(64.0).expand(1, 3, 64, 64) / 10
    step = ramp + 0.4 * ~known  # only pairs from left to right differ, by 0.1; across the border by 0.5 or 0.3
    # across: 32 rows at each side, and at the upper and lower border 32 columns each with 0.4
    across, off = (32 * 0.5 + 32 * 0.3 + 64 * 0.4) / 128, 0.1 / 2
    assert seam(step, known) == pytest.approx(across / off, abs=0.01)
    assert psnr(noise.clamp(-1, 1) + 0.0, noise, known) > 40
    assert psnr(torch.full((2, 3, 64, 64), 0.2), torch.zeros(2, 3, 64, 64)) == 20.0
    assert psnr(torch.zeros(2, 3, 64, 64).where(known, 0.2), torch.zeros(2, 3, 64, 64), ~known) == 20.0
    smooth = torch.nn.functional.interpolate(noise[:4, :, ::8, ::8], size=64)
    assert correlation(smooth, smooth) == 1.0
    assert correlation(-smooth, smooth) == -1.0
