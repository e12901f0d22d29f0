"""Causal transformer from quantized tokens to conditioning vectors: cond[:, :m] needs only the first m tokens."""

import torch
from torch import Tensor, nn

from dar_lightning.layers import KVCache, run_block
from dar_lightning.tokenizer.blocks import GatedBlock, plain_norm
from dar_lightning.tokenizer.config import TABLE_ROWS, TokenizerConfig


class Conditioner(nn.Module):
    """Causal transformer over the token sequence; its outputs condition the pixel decoder."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        dim = config.conditioner_dim
        self.cache_shape = dim // config.head_dim, config.num_tokens, config.head_dim
        self.recompute = False  # activation checkpointing
        self.from_latent = nn.Linear(config.codebook_dim, dim, bias=False)
        self.positions = nn.Embedding(TABLE_ROWS, dim)
        self.blocks = nn.ModuleList(GatedBlock(dim, config.head_dim) for _ in range(config.conditioner_depth))

    def make_cache(self, batch: int) -> KVCache:
        """An empty cache for `batch` sequences of up to num_tokens tokens."""
        return KVCache((len(self.blocks), batch, *self.cache_shape), self.from_latent.weight)

    def forward(self, latents: Tensor, cache: KVCache | None = None) -> Tensor:
        """Conditioning vectors of latents (B, n, codebook_dim): (B, n, D). They follow the tokens in the cache."""
        start = 0 if cache is None else cache.length
        end = start + latents.shape[1]
        # Under autocast the product is bfloat16, but this sum, where the residual stream starts, is float32.
        x = self.from_latent(latents) + self.positions.weight[start:end]
        mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(diagonal=start)
        for layer, block in enumerate(self.blocks):
            x = run_block(block, x, None, mask, cache, layer, recompute=self.recompute)
        if cache is not None:
            cache.length = end
        return plain_norm(x)
