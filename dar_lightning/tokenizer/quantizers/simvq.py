"""SimVQ (arXiv 2411.02038): fixed random codes seen through a learned linear layer, which moves all of them at once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.devices import exact_products
from dar_lightning.errors import check_range
from dar_lightning.tokenizer.quantizers.interface import Quantized
from dar_lightning.tokenizer.quantizers.vector import largest_product


class SimVectorQuantizer(nn.Module):
    """The nearest (Euclidean) of the projected codes, with a straight-through gradient; a Quantizer.

    The random codes are saved with the weights: no config gives them back. Losses: `vq`, (code - sg latent)², and
    `commit`, commitment * (sg code - latent)²; squares are means over channels, sg stops the gradient.
    """

    bypass = False

    def __init__(self, codebook_size: int, codebook_dim: int, commitment: float = 0.25):
        super().__init__()
        check_range(0, commitment=commitment)
        self.register_buffer("rows", torch.randn(codebook_size, codebook_dim) * codebook_dim**-0.5)
        self.projection = nn.Linear(codebook_dim, codebook_dim)
        self.commitment = commitment

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code: that of largest <latent, code> - <code, code> / 2."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False), exact_products():
            weight, bias = self.projection.weight.float(), self.projection.bias.float()
            codes = F.linear(self.rows.float(), weight, bias)
            codes = torch.cat([codes, -codes.square().sum(dim=-1, keepdim=True) / 2], dim=-1)
            return largest_product(F.pad(latents.float(), (0, 1), value=1.0), codes)

    def lookup(self, indices: Tensor) -> Tensor:
        with torch.autocast(indices.device.type, enabled=False):  # as forward hands them on
            return self.projection(F.embedding(indices, self.rows))

    def forward(self, latents: Tensor, read: Tensor | None = None) -> Quantized:
        indices = self.nearest(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z, codes = latents.float(), self.lookup(indices).float()
            vq = (codes - z.detach()).square().mean(dim=-1)
            commit = self.commitment * (codes.detach() - z).square().mean(dim=-1)
            values = codes.detach() + (z - z.detach())
            return Quantized(values.to(latents.dtype), indices, {"vq": vq, "commit": commit})
