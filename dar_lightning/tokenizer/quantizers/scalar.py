"""FSQ and LFQ, quantizers without a learned codebook, from vector-quantize-pytorch, an optional extra."""

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError


class ScalarQuantizer(nn.Module):
    """Rounds every channel by itself; a Quantizer. `make` builds it, given the library.

    Raises:
        UserError: the extra is not installed.
    """

    bypass = False

    def __init__(self, name: str, make):
        super().__init__()
        try:
            import vector_quantize_pytorch
        except ImportError as error:
            needs = "needs vector-quantize-pytorch: pip install 'dar-lightning[quantizers]'"
            raise UserError(f"quantizer is {name!r}, which {needs}") from error
        # It has no weights, only tables that it computes: kept out of the module, they stay out of files.
        with torch.device("cpu"):
            self._library = [make(vector_quantize_pytorch)]

    def nearest(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self(latents)[1]

    def lookup(self, indices: Tensor) -> Tensor:
        return self._library[0].to(indices.device).indices_to_codes(indices)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        library = self._library[0].to(latents.device).train(self.training)
        with torch.autocast(latents.device.type, enabled=False):
            quantized, indices, *loss = library(latents.float())
        zero = torch.zeros(indices.shape, device=latents.device)
        return quantized.to(latents.dtype), indices.long(), zero + (loss[0] if loss else 0.0), zero


class FiniteScalarQuantizer(ScalarQuantizer):
    """FSQ (arXiv 2309.15505): equally many levels in each channel, and no codebook loss."""

    def __init__(self, codebook_size: int, codebook_dim: int):
        levels = round(codebook_size ** (1 / codebook_dim))
        super().__init__("fsq", lambda library: library.FSQ([levels] * codebook_dim, preserve_symmetry=levels == 2))


class LookupFreeQuantizer(ScalarQuantizer):
    """LFQ (arXiv 2310.05737): the sign of each channel; an entropy loss of the batch in place of the codebook loss."""

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__("lfq", lambda library: library.LFQ(dim=codebook_dim, codebook_size=codebook_size))
