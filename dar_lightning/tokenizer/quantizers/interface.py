"""What a quantizer is: the Protocol that all of them follow, and what a forward pass returns."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Quantized(NamedTuple):
    """What a quantizer makes of latents (B, N, dim)."""

    values: Tensor
    """(B, N, dim), in the latents' dtype: the codes, through which the gradient flows to the latents."""
    codes: Tensor
    """(B, N) int64."""
    losses: dict[str, Tensor]
    """By name, weighted, float32: (B, N) of each token, or a scalar of the whole batch, all ranks together."""


class Quantizer(Protocol):
    """A module that turns latents into codes of `codebook_dim` channels, and back.

    It is built as `Cls(codebook_size, codebook_dim, **options)`, of so many codes of so many channels, raises UserError
    for sizes that it cannot have and options out of range, and has no buffers that are not saved: a loaded model would
    find them empty.
    """

    bypass: bool
    """Lets latents through unquantized, for training.callbacks.CodebookWarmup; False where that cannot be."""

    def nearest(self, latents: Tensor) -> Tensor:
        """Index of each latent's code: (B, N, dim) -> (B, N) int64. The same in any batch, mode and precision."""

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes by index, as `forward` hands them on: (B, N) int64 -> (B, N, dim)."""

    def __call__(self, latents: Tensor, read: Tensor | None = None) -> Quantized:
        """Quantize latents (B, N, dim).

        `read` (B, N) bool: the tokens that the step reads, the only ones that losses are of; None is all. The tokenizer
        takes the mean over them of a loss per token. A loss of the batch does so itself (`entropy.sum_over_ranks`).
        """
