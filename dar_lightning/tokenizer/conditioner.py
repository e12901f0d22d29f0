"""Quantized tokens -> conditioning vectors, causally: cond[:, :m] needs only the first m tokens."""

import torch
from torch import Tensor, nn

from dar_lightning.layers import run_block
from dar_lightning.tokenizer.blocks import GatedBlock, KVCache, plain_norm
from dar_lightning.tokenizer.config import TABLE_ROWS, TokenizerConfig


class Conditioner(nn.Module):
    """Causal transformer over the token sequence; its outputs condition the pixel decoder."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        dim = config.conditioner_dim
        self.num_tokens = config.num_tokens
        self.recompute = False  # activation checkpointing
        self.from_latent = nn.Linear(config.codebook_dim, dim, bias=False)
        self.positions = nn.Embedding(TABLE_ROWS, dim)
        self.blocks = nn.ModuleList(GatedBlock(dim, config.head_dim) for _ in range(config.conditioner_depth))

    def make_cache(self) -> list[KVCache]:
        """Empty caches, one per block, for extending a sequence of up to num_tokens tokens."""
        return [KVCache(self.num_tokens) for _ in self.blocks]

    def forward(self, latents: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Condition on latents (B, n, codebook_dim); with a cache they follow the tokens already in it.

        Returns:
            (B, n, D) conditioning vectors of these n tokens.
        """
        start = cache[0].length if cache else 0
        end = start + latents.shape[1]
        # Under autocast the product is bfloat16, but this sum, where the residual stream starts, is float32.
        x = self.from_latent(latents) + self.positions.weight[start:end]
        mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(diagonal=start)
        for i, block in enumerate(self.blocks):
            x = run_block(block, x, None, mask, cache[i] if cache else None, recompute=self.recompute and not cache)
        return plain_norm(x)
