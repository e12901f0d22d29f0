"""Pixel diffusion transformer: velocity of the flow from noisy pixels, time and the tokens' conditioning vectors."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dar_lightning.layers import run_block
from dar_lightning.tokenizer.blocks import MLP, Attention, axial_rotary, plain_norm
from dar_lightning.tokenizer.config import TokenizerConfig

REPA_HIDDEN, REPA_DIM = 2048, 768  # REPA_DIM is the width of DINOv2 ViT-B
MIN_TIME_LEFT = 0.05  # least 1 - t by which a sampling step turns an image estimate into a velocity


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 t, cosines first: (B,) -> (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DiffusionBlock(nn.Module):
    """Self-attention and MLP, modulated per patch by the time and by cross-attention to the conditioning vectors."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        dim = config.decoder_dim
        self.time_mlp = MLP(dim, dim)
        self.cond_mlp = MLP(dim, dim)
        self.cross_attention = Attention(dim, config.head_dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attention = Attention(dim, config.head_dim)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor, rotary: Tensor) -> Tensor:
        """x (B, P, D), sinusoids of time (B, 1, D), cond (B, n, D), rotary of the patch grid -> (B, P, D)."""
        x_norm = plain_norm(x)
        signal = self.cross_attention(x_norm, plain_norm(self.cond_mlp(cond)), rotary)
        signal = F.silu(self.time_mlp(time) + signal)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(signal).chunk(6, dim=-1)
        h = x_norm * (1 + scale_a) + shift_a
        x = x + gate_a * self.attention(h, rotary=rotary)
        h = plain_norm(x) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(h)


class PixelDecoder(nn.Module):
    """Velocity network of the pixel-space flow. With a REPA head, `predict` also returns its hidden state."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        dim, channels = config.decoder_dim, 3 * config.decoder_patch_size**2
        self.config = config
        self.recompute = False  # activation checkpointing
        self.static: bool | None = None  # whether sampling replays `tokenizer.diffusion_step`; None does so on CUDA
        self.conv_in = nn.Conv2d(channels, dim, 1)
        self.cond_proj = nn.Linear(config.conditioner_dim, dim)
        self.blocks = nn.ModuleList(DiffusionBlock(config) for _ in range(config.decoder_depth))
        self.conv_out = nn.Conv2d(dim, channels, 1)
        if config.repa_layer is not None:
            layers = nn.Linear(dim, REPA_HIDDEN), nn.SiLU(), MLP(REPA_HIDDEN, REPA_HIDDEN, REPA_DIM)
            self.repa_head = nn.Sequential(*layers)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Velocity at x (B, 3, H, W) and flow time t (B,), reading cond (B, n, D_cond): (B, 3, H, W) float32.

        x is float32 for any weights: rounded to bfloat16, the state of a solver would lose what small steps add.
        """
        output, _ = self.predict(x, t, cond)
        if self.config.prediction == "velocity":
            return output
        return (output - x) / (1 - t).clamp(min=MIN_TIME_LEFT).view(-1, 1, 1, 1)

    def predict(self, x: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network itself puts out, and what REPA reads. Arguments as in forward.

        Returns:
            (B, 3, H, W) float32, by config.prediction the velocity or the estimate of the scaled image; and the hidden
            patch grid (B, D, H / p, W / p) before block `repa_layer`, or None without a REPA head.
        """
        patch, head_dim = self.config.decoder_patch_size, self.config.head_dim
        x = x.to(self.conv_in.weight.dtype)
        x = rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", p1=patch, p2=patch)
        x = self.conv_in(x)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, P, D); else all blocks would keep it channel by channel
        if self.config.absolute_positions:
            x = x + axial_rotary(height, width, x.shape[-1], device=x.device).flatten(1).to(x.dtype)
        rotary = axial_rotary(height, width, head_dim, device=x.device)
        time = time_embedding(t, x.shape[-1]).to(x.dtype)[:, None]
        cond = plain_norm(self.cond_proj(cond))
        hidden = None
        for i, block in enumerate(self.blocks):
            if i == self.config.repa_layer:
                hidden = rearrange(x, "b (h w) d -> b d h w", h=height)
            x = run_block(block, x, time, cond, rotary, recompute=self.recompute)
        x = self.conv_out(rearrange(plain_norm(x), "b (h w) d -> b d h w", h=height))
        x = rearrange(x, "b (c p1 p2) h w -> b c (h p1) (w p2)", p1=patch, p2=patch)
        return x.float(), hidden

    def project_hidden(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """REPA head on the hidden grid, average-pooled to the teacher's grid: (B, D, h, w) -> (B, rows * columns, 768).

        A hidden grid that is coarser than the teacher's is repeated, so any image size works.
        """
        return self.repa_head(F.adaptive_avg_pool2d(hidden, grid).flatten(2).transpose(1, 2))
