"""Vector quantization (VQ): the nearest code on the unit sphere, with a straight-through gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.devices import exact_products
from dar_lightning.tokenizer.quantizers.interface import Quantized

COMMITMENT_WEIGHT = 0.25
BLOCK = 128  # codes of which the search first keeps only the largest product
# Latents and blocks of codes in one matrix product. On a CPU the products (4 MB) stay in its cache; tiles of a fifth of
# that are somewhat faster on a quiet machine, but on a busy one the threads wait for each other at every tile.
CPU_TILE, GPU_TILE = (256, 32), (4096, 128)


class VectorQuantizer(nn.Module):
    """A learned codebook of unit vectors (D-AR's); a Quantizer. With `bypass`: unit latents, and losses of zero.

    Losses: `vq` moves codes to latents, `commit` latents to codes. CodebookWarmup works with it, and with what inherits
    from it.
    """

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        rows = torch.empty(codebook_size, codebook_dim).uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
        self.codebook = nn.Parameter(F.normalize(rows, dim=-1))
        self.bypass = False

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code of each latent: (..., dim) -> (...) int64.

        On the unit sphere that is the code of largest inner product. TF32 is kept out: it would give a tenth of the
        shipped tokenizer's latents another code (`benchmarks/precision.py`).
        """
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False), exact_products():
            z = F.normalize(latents.float(), dim=-1)
            return largest_product(z, F.normalize(self.codebook.float(), dim=-1))

    def lookup(self, indices: Tensor) -> Tensor:
        return F.normalize(F.embedding(indices, self.codebook), dim=-1)

    def forward(self, latents: Tensor, read: Tensor | None = None) -> Quantized:
        indices = self.nearest(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z = F.normalize(latents.float(), dim=-1)
            z_q = self.lookup(indices)
            vq = (z_q - z.detach()).square().mean(dim=-1)
            commit = COMMITMENT_WEIGHT * (z_q.detach() - z).square().mean(dim=-1)
            if self.bypass:
                return Quantized(z.to(latents.dtype), indices, {"vq": 0 * vq, "commit": 0 * commit})
            return Quantized((z + (z_q - z).detach()).to(latents.dtype), indices, {"vq": vq, "commit": commit})


def largest_product(z: Tensor, codes: Tensor) -> Tensor:
    """Index of the code of largest inner product, of equal ones the first: (..., dim), (size, dim) -> (...) int64.

    Finding a maximum is much faster than finding its place: the first pass takes the maximum of every block of codes,
    the second looks for its place in the winning block alone. Only a tile of the products exists at a time.
    """
    rows, blocks = CPU_TILE if z.device.type == "cpu" else GPU_TILE
    return torch.cat([_nearest(some, codes, blocks) for some in z.flatten(0, -2).split(rows)]).view(z.shape[:-1])


def _nearest(z: Tensor, codes: Tensor, blocks_per_tile: int) -> Tensor:
    """Index of the largest product of each row: (n, dim), (size, dim) -> (n,). Of equal ones, the first."""
    size = len(codes)
    if size <= 4 * BLOCK:
        return (z @ codes.T).argmax(dim=1)
    if missing := -size % BLOCK:  # copies of the last code never come before it
        codes = torch.cat([codes, codes[-1:].expand(missing, -1)])
    tiles = codes.split(blocks_per_tile * BLOCK)
    peaks = torch.cat([(z @ tile.T).unflatten(1, (-1, BLOCK)).amax(dim=-1) for tile in tiles], dim=1)
    first = peaks.argmax(dim=1, keepdim=True) * BLOCK  # of the winning block, (n, 1)
    block = F.embedding(first + torch.arange(BLOCK, device=z.device), codes)  # (n, BLOCK, dim)
    place = torch.bmm(block, z[:, :, None]).squeeze(-1).argmax(dim=1)
    return (first.squeeze(1) + place).clamp(max=size - 1)
