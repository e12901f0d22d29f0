"""FSQ and LFQ, quantizers without a learned codebook, from vector-quantize-pytorch, an optional extra."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError


class ScalarQuantizer(nn.Module, ABC):
    """Rounds every channel by itself to one of `levels` values; a Quantizer.

    Args:
        codebook_size: levels to the power of codebook_dim.
        codebook_dim: channels of a code.

    Raises:
        UserError: for another size, or if the extra is not installed.
    """

    name: str
    bypass = False

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.levels = round(codebook_size ** (1 / codebook_dim))
        if self.levels < 2 or self.levels**codebook_dim != codebook_size:
            raise UserError(
                f"codebook_size is {codebook_size}: {self.name} needs a number of levels to the power of codebook_dim, "
                f"{codebook_dim}"
            )
        try:
            import vector_quantize_pytorch
        except ImportError as error:
            raise UserError(
                f"quantizer is {self.name!r}, which needs vector-quantize-pytorch: "
                "pip install 'dar-lightning[quantizers]'"
            ) from error
        # It has no weights, only tables that it computes: kept out of the module, they stay out of files.
        with torch.device("cpu"):
            self._library = [self._make(vector_quantize_pytorch, codebook_dim)]

    @abstractmethod
    def _make(self, library, dim: int) -> nn.Module:
        """The quantizer of vector-quantize-pytorch, for `dim` channels."""

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Codes (B, N, dim) with their gradient, indices (B, N) and a loss."""
        library = self._library[0].to(latents.device).train(self.training)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, indices, *loss = library(latents.float())
        return quantized, indices.long(), loss[0] if loss else 0.0

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        return self._quantize(latents)[1]

    def lookup(self, indices: Tensor) -> Tensor:
        return self._library[0].to(indices.device).indices_to_codes(indices)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        quantized, indices, loss = self._quantize(latents)
        zero = torch.zeros(indices.shape, device=latents.device)
        return quantized.to(latents.dtype), indices, zero + loss, zero


class FiniteScalarQuantizer(ScalarQuantizer):
    """FSQ (arXiv 2309.15505): equally many levels in each channel, and no codebook loss."""

    name = "fsq"

    def _make(self, library, dim: int) -> nn.Module:
        return library.FSQ([self.levels] * dim, preserve_symmetry=self.levels == 2)


class LookupFreeQuantizer(ScalarQuantizer):
    """LFQ (arXiv 2310.05737): the sign of each channel; an entropy loss of the batch in place of the codebook loss."""

    name = "lfq"

    def _make(self, library, dim: int) -> nn.Module:
        if self.levels != 2:
            raise UserError(f"codebook_size is {self.levels**dim}: lfq needs 2^codebook_dim, {2**dim}")
        return library.LFQ(dim=dim, codebook_size=2**dim)
