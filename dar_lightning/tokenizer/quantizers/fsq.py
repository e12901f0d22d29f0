"""FSQ, finite scalar quantization (arXiv 2309.15505): each channel rounded to one of a few levels; no codebook loss."""

import math

import torch
from torch import Tensor, nn

from dar_lightning.errors import require
from dar_lightning.tokenizer.quantizers.interface import Quantized

MARGIN = 1e-3  # by which tanh reaches beyond the outermost levels


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel, squashed by tanh, to its levels; a Quantizer without weights.

    Codes are in [-1, 1]. The first channel changes fastest with the index.

    Args:
        codebook_size: the product of the levels.
        codebook_dim: channels.
        levels: levels of each channel, such as [8, 8, 8, 5, 5, 5]; None for equally many in each.
    """

    bypass = False

    def __init__(self, codebook_size: int, codebook_dim: int, levels: list[int] | None = None):
        super().__init__()
        if levels is None:
            need = f"fsq needs a number of levels to the power of codebook_dim, {codebook_dim}, or the option levels"
            require(codebook_dim < codebook_size.bit_length(), f"codebook_size is {codebook_size}: {need}")
            levels = [round(codebook_size ** (1 / codebook_dim))] * codebook_dim
        else:
            whole = isinstance(levels, list) and all(type(level) is int and level >= 2 for level in levels)
            fits = whole and len(levels) == codebook_dim
            require(fits, f"levels is {levels}: fsq needs {codebook_dim} numbers of 2 or more, as codebook_dim says")
            need = f"fsq needs the product of levels {levels}, {math.prod(levels)}"
        require(math.prod(levels) == codebook_size, f"codebook_size is {codebook_size}: {need}")
        self.levels = levels

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Levels of each channel, and what one level of it adds to the index: (dim,) int64 each."""
        steps = [math.prod(self.levels[:channel]) for channel in range(len(self.levels))]
        # Not buffers, which weights would hold; non_blocking: nothing waits for a GPU.
        return tuple(torch.tensor(table).to(device, non_blocking=True) for table in (self.levels, steps))

    def nearest(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self(latents).codes

    def lookup(self, indices: Tensor) -> Tensor:
        levels, steps = self._tables(indices.device)
        return self._codes(indices[..., None] // steps % levels, levels)

    @staticmethod
    def _codes(level: Tensor, levels: Tensor) -> Tensor:
        """Values of levels counted from 0: (..., dim) int64 -> float32. Of 4, 6, ... levels none stands at 1."""
        middle = levels // 2
        return torch.where(levels == 2, 2 * level - 1, (level - middle) / middle)

    def forward(self, latents: Tensor, read: Tensor | None = None) -> Quantized:
        levels, steps = self._tables(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            z, middle = latents.float(), levels // 2
            half, offset = (levels - 1) * (1 + MARGIN) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
            bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
            side = torch.tanh(z)  # two levels: its sign, so that 0 is the border
            level = torch.where(levels == 2, ((side + 1) / 2 + 0.5).floor(), bounded.round() + middle)
            level = level.nan_to_num().long()  # of a step that SkipBadSteps skips; the values stay NaN
            codes, soft = self._codes(level, levels), torch.where(levels == 2, side, bounded / middle)
            values = codes + (soft - soft.detach())
            return Quantized(values.to(latents.dtype), (level * steps).sum(dim=-1), {})
