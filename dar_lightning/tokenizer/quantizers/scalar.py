"""Quantizers without a learned codebook, for ablations: FSQ and LFQ from vector-quantize-pytorch, an optional extra."""

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig


class ScalarQuantizer(nn.Module):
    """Rounds every channel by itself, with the interface of VectorQuantizer.

    "fsq" (arXiv 2309.15505) rounds to equally many levels in each channel, codebook_size^(1 / codebook_dim) of them.
    "lfq" (arXiv 2310.05737) keeps the sign; its entropy loss, of all tokens of the batch, takes the place of the
    codebook loss.

    Args:
        config: its quantizer, codebook_size and codebook_dim.
    """

    bypass = False  # as a VectorQuantizer's

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        try:
            from vector_quantize_pytorch import FSQ, LFQ
        except ImportError as error:
            raise UserError(
                f"quantizer is {config.quantizer!r}, which needs vector-quantize-pytorch: "
                "pip install 'dar-lightning[quantizers]'"
            ) from error
        with torch.device("cpu"):
            if config.quantizer == "fsq":
                library = FSQ([config.levels] * config.codebook_dim, preserve_symmetry=config.levels == 2)
            else:
                library = LFQ(dim=config.codebook_dim, codebook_size=config.codebook_size)
        # It has no weights, only tables that it computes: kept out of the module, they stay out of files.
        self._library = [library]

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Codes (B, N, dim) with their gradient, indices (B, N) and a loss."""
        library = self._library[0].to(latents.device).train(self.training)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, indices, *loss = library(latents.float())
        return quantized, indices.long(), loss[0] if loss else 0.0

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Index of each latent's code: (B, N, dim) -> (B, N) int64."""
        return self._quantize(latents)[1]

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index: (B, N) int64 -> (B, N, dim)."""
        return self._library[0].to(indices.device).indices_to_codes(indices)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As VectorQuantizer's: quantized latents, indices, and per token (B, N) a codebook loss and 0."""
        quantized, indices, loss = self._quantize(latents)
        zero = torch.zeros(indices.shape, device=latents.device)
        return quantized.to(latents.dtype), indices, zero + loss, zero
