"""Attention, MLP, transformer block and 2-D positions of the tokenizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.layers import KVCache, rotate

NORM_EPS = 1e-6


def axial_rotary(height: int, width: int, head_dim: int, theta: float = 10000.0, device=None) -> Tensor:
    """2-D RoPE of a patch grid: half of the channel pairs for the row, half for the column.

    Returns:
        (height * width, head_dim / 2, 2): cosine and sine of each pair's angle.
    """
    axis_dim = head_dim // 2
    frequencies = theta ** (-torch.arange(0, axis_dim, 2, device=device, dtype=torch.float32) / axis_dim)
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def identity_rotary(length: int, head_dim: int, device=None) -> Tensor:
    """RoPE by angles of 0, for tokens without a place in the image: (length, head_dim / 2, 2)."""
    rotary = torch.zeros(length, head_dim // 2, 2, device=device)
    rotary[..., 0] = 1.0
    return rotary


def axial_sincos(height: int, width: int, dim: int, theta: float = 10000.0, device=None) -> Tensor:
    """Fixed sine-cosine positions of a patch grid (ViT, MAE), half for the row, half for the column: (L, dim)."""
    return axial_rotary(height, width, dim, theta, device).flatten(1)


class Attention(nn.Module):
    """Multi-head attention with per-head LayerNorm on queries and keys; self-attention, or cross with a context."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(head_dim, eps=NORM_EPS)

    def forward(
        self,
        x: Tensor,  # (B, L, D)
        context: Tensor | None = None,  # (B, M, D); None: x itself
        q_rotary: Tensor | None = None,
        k_rotary: Tensor | None = None,
        mask: Tensor | None = None,  # (L, M) boolean, true = may look
        cache: KVCache | None = None,
        layer: int = 0,  # of the cache
    ) -> Tensor:  # (B, L, D)
        context = x if context is None else context
        q = self.q_norm(self._split(self.q(x)))
        k = self.k_norm(self._split(self.k(context)))
        v = self._split(self.v(context))
        if q_rotary is not None:
            q = rotate(q, q_rotary)
        if k_rotary is not None:
            k = rotate(k, k_rotary)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:  # (B, L, D) -> (B, heads, L, head_dim)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


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
        x = x + self.gate1 * self.attention(self.norm1(x), None, rotary, rotary, mask, cache, layer)  # (B, L, D)
        return x + self.gate2 * self.mlp(self.norm2(x))


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
