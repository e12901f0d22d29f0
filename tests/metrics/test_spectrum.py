"""The spectrum of images whose spectrum is known."""

import math

import pytest
import torch

from dar_lightning.metrics.spectrum import radial_spectrum


def test_white_noise_is_flat():
    noise = 2 * torch.randn(500, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(radial_spectrum(noise).mean(dim=0)[1:], torch.tensor(4.0), rtol=0.03)


@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, 1.0), (0.6, 0.8)])
def test_a_wave_is_at_its_frequency(direction):
    cycles, size = 10, 64
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    phase = 2 * math.pi * cycles / size * (direction[0] * rows + direction[1] * columns)
    spectrum = radial_spectrum(5.0 + phase.cos().expand(3, size, size))
    assert spectrum.shape == (32,)
    assert spectrum.argmax() == cycles - 1, "it starts at one cycle"
    assert spectrum[cycles - 3 : cycles + 2].sum() > 0.99 * spectrum.sum()
