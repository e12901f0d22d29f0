"""LFQ, lookup-free quantization (arXiv 2310.05737): the sign of each channel, kept in use by an entropy loss.

And BSQ, binary spherical quantization (arXiv 2406.07548): LFQ of unit vectors.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.errors import check_range, require
from dar_lightning.tokenizer.quantizers.entropy import bit_entropies
from dar_lightning.tokenizer.quantizers.interface import Quantized


class LookupFreeQuantizer(nn.Module):
    """Codes {-1, 1}^codebook_dim; a Quantizer without weights. The first channel is the index's highest bit.

    Its losses are `entropy`, which makes each token sure of its code, minus `batch_entropy`, which spreads the tokens
    over the codes: bit by bit (`entropy.bit_entropies`), of the tokens of all ranks.

    Args:
        codebook_size: number of codes, 2 to the power of codebook_dim.
        codebook_dim: channels.
        entropy_weight: factor on both entropies.
        diversity: factor on the batch's, beside.
        temperature: of the assignment to codes, whose logits are 2 <latent, code> / temperature.
        commit_weight: factor on the squared distance of latents to their codes; 0 leaves it out, Open-MAGVIT2 has 0.25.
    """

    bypass = False
    name = "lfq"
    scale = 1.0  # of the codes

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 0.01,
        commit_weight: float = 0.0,
    ):
        super().__init__()
        need = f"{self.name} needs 2 to the power of codebook_dim, {codebook_dim}"
        size_of_bits = codebook_size.bit_count() == 1 and codebook_size.bit_length() == codebook_dim + 1
        require(size_of_bits, f"codebook_size is {codebook_size}: {need}")
        check_range(0, entropy_weight=entropy_weight, diversity=diversity, commit_weight=commit_weight)
        require(0 < temperature < math.inf, f"temperature is {temperature}: it must be positive and finite")
        self.dim, self.entropy_weight, self.diversity = codebook_dim, entropy_weight, diversity
        self.temperature, self.commit_weight = temperature, commit_weight

    def space(self, latents: Tensor) -> Tensor:
        """Latents (..., dim) where the codes live, in float32."""
        return latents.float()

    def _values_of_bits(self, device: torch.device) -> Tensor:
        return 2 ** torch.arange(self.dim - 1, -1, -1, device=device)

    def nearest(self, latents: Tensor) -> Tensor:
        return ((latents > 0) * self._values_of_bits(latents.device)).sum(dim=-1)

    def lookup(self, indices: Tensor) -> Tensor:
        bits = indices[..., None] // self._values_of_bits(indices.device) % 2
        return (2.0 * bits - 1.0) * self.scale

    def forward(self, latents: Tensor, read: Tensor | None = None) -> Quantized:
        indices = self.nearest(latents)
        with torch.autocast(latents.device.type, enabled=False):
            z, codes = self.space(latents), self.lookup(indices)
            each, batch = bit_entropies(4 * self.scale / self.temperature * z, read, self.training)
            losses = {
                "entropy": self.entropy_weight * each,
                "batch_entropy": -self.entropy_weight * self.diversity * batch,
            }
            if self.commit_weight:
                losses["commit"] = self.commit_weight * (codes - z).square().mean(dim=-1)
            return Quantized((codes + (z - z.detach())).to(latents.dtype), indices, losses)


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """Codes {-1, 1}^codebook_dim / sqrt(codebook_dim), on the sphere that latents are put on; a Quantizer.

    The options are LFQ's, with bsq-vit's temperature of 1. Two things differ from that code: its gradient through the
    codes is smaller by 1 / sqrt(codebook_dim), and its entropy weight falls from 0.3 to 0.1 in the first 2,000 steps.
    """

    name = "bsq"

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        entropy_weight: float = 0.1,
        diversity: float = 1.0,
        temperature: float = 1.0,
        commit_weight: float = 0.0,
    ):
        super().__init__(codebook_size, codebook_dim, entropy_weight, diversity, temperature, commit_weight)
        self.scale = codebook_dim**-0.5

    def space(self, latents: Tensor) -> Tensor:
        return F.normalize(latents.float(), dim=-1)
