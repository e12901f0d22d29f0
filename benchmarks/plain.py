"""Plain versions of what the package does with care: what the benchmarks compare with. Same results, more work."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.sampling import draw_tokens
from dar_lightning.layers import KVCache
from dar_lightning.tokenizer.quantizers.vector import COMMITMENT_WEIGHT


def quantize(latents: Tensor, codebook: Tensor, one_hot: bool = True, entropy: bool = False) -> tuple[Tensor, Tensor]:
    """Nearest codes by the matrix of all squared distances: (..., dim), (size, dim) -> loss, indices (...).

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
    loss = (z + (found - z).detach()).sum() + vq + COMMITMENT_WEIGHT * commit
    if entropy:
        share, logs = (-distances / 0.01).softmax(dim=-1), (-distances / 0.01).log_softmax(dim=-1)
        mean = share.mean(dim=0)
        loss = loss + 0.0 * ((mean * (mean + 1e-5).log()).sum() - (share * logs).sum(dim=-1).mean())
    return loss, indices.view(latents.shape[:-1])


class StaticCache(KVCache):
    """Gives attention the whole buffer at every step, copied for its heads, whatever is filled."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        super().extend(layer, keys, values)
        k, v = self.buffer[layer]
        return k.repeat_interleave(1, dim=1), v.repeat_interleave(1, dim=1)


@torch.no_grad()
def generate(ar: ARModel, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (B, N) with a static cache and a mask, as ar.sampling.generate draws them without guidance."""
    config, weight = ar.config, ar.head.weight
    head_dim = config.dim // config.num_heads
    cache = StaticCache((config.depth, len(labels), config.kv_heads, config.num_tokens, head_dim), weight)
    cache.buffer.zero_()
    mask = torch.ones(config.num_tokens, config.num_tokens, dtype=torch.bool, device=weight.device).tril()
    x, codes = ar.class_embedding(labels).values, []
    draws = draw_keys(len(labels), config.num_tokens, generator, weight.device)
    for position in range(config.num_tokens):
        cache.length = position
        for layer, block in enumerate(ar.blocks):
            x = block(x, ar.rotary[position : position + 1], mask[position : position + 1], cache, layer)
        codes.append(draw_tokens(ar.head(ar.norm(x))[:, 0], draws[:, position]))
        x = ar.token_embedding(codes[-1])[:, None]
    return torch.stack(codes, dim=1)


@contextmanager
def attention_maps() -> Iterator[None]:
    """Within, every attention also builds its map and drops it."""
    fused = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        (scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)).softmax(dim=-1)
        return fused(q, k, v, attn_mask=attn_mask)

    with patch.object(F, "scaled_dot_product_attention", attend):
        yield
