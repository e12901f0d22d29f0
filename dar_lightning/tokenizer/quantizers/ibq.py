"""IBQ, index backpropagation quantization (arXiv 2412.02692): every code of a learned codebook learns at each step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dar_lightning.devices import exact_products
from dar_lightning.errors import check_range, require
from dar_lightning.tokenizer.quantizers.entropy import sum_over_ranks
from dar_lightning.tokenizer.quantizers.interface import Quantized
from dar_lightning.tokenizer.quantizers.vector import largest_product

CHUNK = 2**24  # probabilities that exist at a time, 64 MB; the backward pass computes them again


class IndexBackpropagationQuantizer(nn.Module):
    """The code of largest product, with the gradient of a softmax over all codes; a Quantizer.

    Latents are not normalised. The losses (squares are means over channels, sg stops the gradient): `vq`, commitment *
    (code - sg latent)²; `commit`, (sg code - latent)²; `joint`, (values - latent)² with the softmax's gradient;
    `entropy` and `batch_entropy`, those of each token's and of the batch's mean distribution over codes, the latter
    over the tokens of all ranks.

    Args:
        codebook_size: number of codes.
        codebook_dim: the paper has 256.
        commitment: factor on `vq`.
        entropy_weight: factor on both entropies.
        temperature: of the distributions whose entropies these are; that of the gradient is 1.
    """

    bypass = False

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        commitment: float = 0.25,
        entropy_weight: float = 0.05,
        temperature: float = 0.01,
    ):
        super().__init__()
        check_range(0, commitment=commitment, entropy_weight=entropy_weight)
        require(0 < temperature < math.inf, f"temperature is {temperature}: it must be positive and finite")
        self.codebook = nn.Parameter(torch.randn(codebook_size, codebook_dim))
        self.commitment, self.entropy_weight, self.temperature = commitment, entropy_weight, temperature

    def nearest(self, latents: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False), exact_products():
            return largest_product(latents.float(), self.codebook.float())

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook)

    def _soft(self, z: Tensor, codebook: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens (n, dim): mean codes (n, dim), entropies (n,), the sum of the read ones' distributions (size,)."""
        rows = max(1, CHUNK // len(codebook))
        parts = [
            checkpoint(self._soft_part, some, codebook, which, use_reentrant=False, preserve_rng_state=False)
            for some, which in zip(z.split(rows), read.split(rows), strict=True)
        ]
        soft, each, total = zip(*parts, strict=True)
        return torch.cat(soft), torch.cat(each), sum(total)

    def _soft_part(self, z: Tensor, codebook: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = z @ codebook.T
        logs = (logits / self.temperature).log_softmax(dim=-1)
        sharp = logs.exp()
        return logits.softmax(dim=-1) @ codebook.detach(), -(sharp * logs).sum(dim=-1), read @ sharp

    def forward(self, latents: Tensor, read: Tensor | None = None) -> Quantized:
        indices = self.nearest(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z, codebook, codes = latents.float(), self.codebook.float(), self.lookup(indices).float()
            read = torch.ones(indices.shape, device=z.device) if read is None else read.float()
            soft, each, total = self._soft(z.flatten(0, 1), codebook, read.flatten())
            soft, each = soft.view_as(z), each.view(indices.shape)
            total = sum_over_ranks(torch.cat([total, read.sum().view(1)]), self.training)
            mean = (total[:-1] / total[-1]).clamp(min=torch.finfo(torch.float32).tiny)
            values = codes + (soft - soft.detach())
            losses = {
                "vq": self.commitment * (codes - z.detach()).square().mean(dim=-1),
                "commit": (codes.detach() - z).square().mean(dim=-1),
                "joint": (values - z).square().mean(dim=-1),
                "entropy": self.entropy_weight * each,
                "batch_entropy": -self.entropy_weight * torch.special.entr(mean).sum(),
            }
            return Quantized(values.to(latents.dtype), indices, losses)
