"""Nearest code on the unit sphere, with a straight-through gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMMITMENT_WEIGHT = 0.25
ROWS_PER_CHUNK = 4096


class VectorQuantizer(nn.Module):
    """A codebook of unit vectors.

    Args:
        size: number of codes.
        dim: channels of a code.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        rows = torch.empty(size, dim).uniform_(-1.0 / size, 1.0 / size)
        self.codebook = nn.Parameter(F.normalize(rows, dim=-1))
        self.bypass = False  # lets latents through unquantized, for a warm-up: see callbacks.CodebookWarmup

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code of each latent: (..., dim) -> (...) int64.

        On the unit sphere the nearest code is the one of largest inner product. Rows go through in chunks, so that
        memory does not grow with batch x codebook.
        """
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            z = F.normalize(latents.float(), dim=-1).flatten(0, -2)
            codes = F.normalize(self.codebook.float(), dim=-1)
            indices = [(rows @ codes.T).argmax(dim=-1) for rows in z.split(ROWS_PER_CHUNK)]
            return torch.cat(indices).view(latents.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Unit vectors of the codes: (...) int64 -> (..., dim)."""
        return F.normalize(F.embedding(indices, self.codebook), dim=-1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize latents (B, N, dim).

        Returns:
            The quantized latents (B, N, dim), in the dtype of `latents`, whose gradient flows straight through to
            `latents`; the code indices (B, N); and, in float32, per token (B, N) the codebook loss and the commitment
            loss (its weight 0.25 included). With `bypass` set, the unit latents themselves, and losses of zero.
        """
        indices = self.nearest(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = F.normalize(latents.float(), dim=-1)
            z_q = self.lookup(indices)
            vq = (z_q - z.detach()).square().mean(dim=-1)
            commit = COMMITMENT_WEIGHT * (z_q.detach() - z).square().mean(dim=-1)
            if self.bypass:
                return z.to(latents.dtype), indices, 0 * vq, 0 * commit
            return (z + (z_q - z).detach()).to(latents.dtype), indices, vq, commit
