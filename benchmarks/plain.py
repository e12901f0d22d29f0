"""The plain search for nearest codes, which the benchmarks compare the package with. Same results, more work."""

import torch.nn.functional as F
from torch import Tensor

from dar_lightning.tokenizer.quantizers.vector import COMMITMENT_WEIGHT


def quantize(
    latents: Tensor, codebook: Tensor, one_hot: bool = True, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest codes by the matrix of all squared distances: (..., dim), (size, dim) -> values, loss, indices (...).

    Codes come by a product with one-hot rows, as VQ-VAEs first did, or are looked up; `entropy` computes VQGAN's
    entropy loss of the distances and gives it a weight of zero.
    """
    z, codes = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
    flat = z.flatten(0, -2)
    distances = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
    indices = distances.argmin(dim=1)
    found = F.one_hot(indices, len(codes)).to(codes.dtype) @ codes if one_hot else F.embedding(indices, codes)
    found = found.view_as(z)
    vq, commit = (found - z.detach()).square().mean(), (found.detach() - z).square().mean()
    loss = vq + COMMITMENT_WEIGHT * commit
    if entropy:
        share, logs = (-distances / 0.01).softmax(dim=-1), (-distances / 0.01).log_softmax(dim=-1)
        mean = share.mean(dim=0)
        loss = loss + 0.0 * ((mean * (mean + 1e-5).log()).sum() - (share * logs).sum(dim=-1).mean())
    return z + (found - z).detach(), loss, indices.view(latents.shape[:-1])
