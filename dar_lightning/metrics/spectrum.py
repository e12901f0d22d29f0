"""Radial power spectrum of images."""

import torch
from torch import Tensor


def radial_spectrum(images: Tensor) -> Tensor:
    """Mean power of images (..., C, S, S) at 1, 2, ..., S // 2 cycles per image, over directions: (..., S // 2).

    A Hann window hides the borders; white noise of variance 1 has a power of 1 everywhere.
    """
    size = images.shape[-1]
    window = torch.hann_window(size, periodic=True, device=images.device)
    window = window[:, None] * window
    centred = images.float() - images.float().mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.fft2(centred * window).abs().square() / window.square().sum()
    cycles = torch.fft.fftfreq(size, 1 / size, device=images.device)
    ring = torch.hypot(cycles[:, None], cycles).round().long().flatten()  # (S * S,)
    rings = torch.zeros(*power.shape[:-2], int(ring.max()) + 1, device=images.device)
    rings = rings.index_add(-1, ring, power.flatten(-2)) / ring.bincount()
    return rings[..., 1 : size // 2 + 1].mean(dim=-2)
