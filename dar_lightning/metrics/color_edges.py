"""Colour and edge statistics of small photographs: features without weights, for tests and the quickstart.

A Frechet distance on them says whether samples have the colours and the coarse structure of the reference, not whether
they look like photographs. Results are measured with a named network.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CANVAS = 32


class ColorEdges(nn.Module):
    """uint8 images (B, 3, H, W) to float32 features (B, 180), from a canvas of 32x32 in opponent colours.

    Layout: means of three axes (lightness, red - green, yellow - blue) in each quadrant (12). Colour: soft histograms,
    8x8 bins of chroma and 8 of lightness, of the image and of its central quarter (144). Edges: gradient energy in 4
    directions for each axis at 16 and at 8 pixels (24). Counts and energies enter as square roots, so that distances
    between histograms are Hellinger's.
    """

    resize = f"area to {CANVAS}x{CANVAS}"

    def __init__(self) -> None:
        super().__init__()
        axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
        self.register_buffer("axes", F.normalize(axes, dim=1))
        # Lightness ends at sqrt(3), chroma at about 0.8, but photographs rarely pass 0.6 and are seldom very blue.
        self.register_buffer("lightness_bins", torch.linspace(0.1, 1.6, 8))
        self.register_buffer("chroma_bins", torch.linspace(-0.35, 0.6, 8))
        self.register_buffer("directions", torch.arange(4) * (math.pi / 4))

    def forward(self, images: Tensor) -> Tensor:
        pixels = F.adaptive_avg_pool2d(images.float() / 255, CANVAS)
        opponent = torch.einsum("ac,bchw->bahw", self.axes, pixels)
        center = opponent[:, :, CANVAS // 4 : -CANVAS // 4, CANVAS // 4 : -CANVAS // 4]
        layout = F.adaptive_avg_pool2d(opponent, 2).flatten(1)
        edges = [self._edges(F.adaptive_avg_pool2d(opponent, size)) for size in (16, 8)]
        return torch.cat([layout, self._histograms(opponent), self._histograms(center), *edges], dim=1)

    def _histograms(self, opponent: Tensor) -> Tensor:
        """(B, 3, h, w) opponent colours -> (B, 72)."""
        lightness, red, yellow = opponent.flatten(2).unbind(1)  # each (B, P)
        red, yellow = _soft_bins(red, self.chroma_bins), _soft_bins(yellow, self.chroma_bins)
        chroma = torch.einsum("bpi,bpj->bij", red, yellow).flatten(1) / red.shape[1]
        return torch.cat([chroma, _soft_bins(lightness, self.lightness_bins).mean(dim=1)], dim=1).sqrt()

    def _edges(self, opponent: Tensor) -> Tensor:
        """(B, 3, h, w) opponent colours -> (B, 12): axes x directions, modulo 180 degrees."""
        dx = F.pad(opponent[..., :, 2:] - opponent[..., :, :-2], (1, 1))
        dy = F.pad(opponent[..., 2:, :] - opponent[..., :-2, :], (0, 0, 1, 1))
        toward = torch.atan2(dy, dx).unsqueeze(2) - self.directions.view(-1, 1, 1)  # (B, 3, 4, h, w)
        energy = torch.hypot(dx, dy).unsqueeze(2) * toward.cos() ** 4
        return energy.mean(dim=(-2, -1)).flatten(1).sqrt()


def _soft_bins(values: Tensor, centers: Tensor) -> Tensor:
    """(B, P) values -> (B, P, bins) weights: a value is shared by the two nearest of evenly spaced centers."""
    step = centers[1] - centers[0]
    values = values.clamp(centers[0], centers[-1]).unsqueeze(-1)
    return (1 - (values - centers).abs() / step).clamp(min=0)
