"""The key/value cache of the AR model's attention."""

import torch
from torch import Tensor

from dar_lightning.ar.config import ARConfig


class KVCache:
    """Keys and values of every block for up to num_tokens positions, allocated once.

    Args:
        config: the model's hyperparameters.
        batch: number of sequences.
        order: (batch, N) int64, the place of each token that is written; for a model that embeds it.
    """

    def __init__(self, config: ARConfig, batch: int, device=None, dtype=None, order: Tensor | None = None):
        shape = (config.depth, 2, batch, config.kv_heads, config.num_tokens, config.dim // config.num_heads)
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.order = order

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, kv_heads, n, head_dim) after `length`; return views of all (B, kv_heads, m, .)."""
        end = self.length + keys.shape[2]
        k, v = self.buffer[layer]
        k[:, :, self.length : end] = keys
        v[:, :, self.length : end] = values
        return k[:, :, :end], v[:, :, :end]
