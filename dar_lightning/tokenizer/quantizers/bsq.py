"""BSQ, binary spherical quantization (arXiv 2406.07548): LFQ of unit vectors."""

import torch.nn.functional as F
from torch import Tensor

from dar_lightning.tokenizer.quantizers.lfq import LookupFreeQuantizer


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
