"""Attention, MLP, transformer block and 2-D positions of the tokenizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.layers import KVCache, rotate

NORM_EPS = 1e-6


def axial_rotary(height: int, width: int, head_dim: int, others: int = 0, device=None) -> Tensor:
    """2-D RoPE of a patch grid: half of the channel pairs for the row, half for the column.

    Flattened, also the fixed sine-cosine positions of ViT and MAE. `others` more tokens have no place: angles of 0.

    Returns:
        (height * width + others, head_dim / 2, 2): cosine and sine of each pair's angle.
    """
    axis_dim = head_dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, axis_dim, 2, device=device, dtype=torch.float32) / axis_dim)
    rows, columns = (torch.arange(side, device=device) for side in (height, width))
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=1)
    angles = F.pad(angles, (0, 0, 0, others))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with per-head LayerNorm on queries and keys."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, context=None, rotary=None, mask=None, cache: KVCache | None = None, layer: int = 0):
        """x (B, L, D) attends to a context (B, M, D) or itself, which alone rotates keys: (B, L, D)."""
        read = x if context is None else context
        q, k, v = [  # (B, L or M, heads, head_dim), in this order in memory, in which LayerNorm copies nothing
            project(given).unflatten(-1, (-1, self.head_dim))
            for project, given in ((self.q, x), (self.k, read), (self.v, read))
        ]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            angles = rotary[:, None]  # the same for all heads
            q = rotate(q, angles)
            k = rotate(k, angles) if context is None else k
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


class MLP(nn.Sequential):
    """Linear, SiLU, Linear."""

    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim if out is None else out))


class GatedBlock(nn.Module):
    """Pre-norm transformer block; each branch is added through a learned per-channel gate."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = Attention(dim, head_dim)
        self.gate1 = nn.Parameter(torch.zeros(dim))
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, 4 * dim)
        self.gate2 = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, rotary=None, mask=None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.gate1 * self.attention(self.norm1(x), None, rotary, mask, cache, layer)  # (B, L, D)
        return x + self.gate2 * self.mlp(self.norm2(x))


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
