"""Quantizers by name: latents to codes and back. A new one is a file here, a line in QUANTIZERS and its config name."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from dar_lightning.tokenizer.quantizers.scalar import FiniteScalarQuantizer, LookupFreeQuantizer
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer


class Quantizer(Protocol):
    """A module that turns latents into codes of `codebook_dim` channels, and back."""

    bypass: bool  # lets latents through unquantized, for training.callbacks.CodebookWarmup

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of each latent's code: (B, N, dim) -> (B, N) int64."""

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index: (B, N) int64 -> (B, N, dim)."""

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize latents (B, N, dim).

        Returns:
            The quantized latents, in the dtype of `latents`, through which the gradient flows to them; the code indices
            (B, N); and in float32, per token (B, N), the codebook loss and the commitment loss, weighted.
        """


# name in TokenizerConfig.quantizer -> called with codebook_size and codebook_dim
QUANTIZERS: dict[str, Callable[[int, int], Quantizer]] = {
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
    "lfq": LookupFreeQuantizer,
}
