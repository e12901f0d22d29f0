"""Image encoder: a ViT whose N learned queries become N ordered latents (paper, section 3.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.layers import run_block
from dar_lightning.tokenizer.blocks import GatedBlock, axial_rotary, plain_norm
from dar_lightning.tokenizer.config import TABLE_ROWS, TokenizerConfig

QUERY_RANK = 8


class Encoder(nn.Module):
    """Reads an image with N learned queries; query i sees every patch and the queries up to itself."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        dim, patch = config.encoder_dim, config.encoder_patch_size
        self.config = config
        self.recompute = False  # activation checkpointing
        self.patchify = nn.Conv2d(3, dim, patch, stride=patch)
        self.queries = nn.Embedding(TABLE_ROWS, QUERY_RANK if config.low_rank_queries else dim)
        self.query_proj = nn.Linear(QUERY_RANK, dim) if config.low_rank_queries else nn.Identity()
        self.blocks = nn.ModuleList(GatedBlock(dim, config.head_dim) for _ in range(config.encoder_depth))
        self.to_latent = nn.Linear(dim, config.codebook_dim, bias=False)
        # Every channel of every token has its own statistics, so that each token must differ between images.
        channels = config.num_tokens * config.codebook_dim
        self.latent_norm = nn.BatchNorm1d(channels, affine=False) if config.latent_norm == "batch" else None

    def forward(self, images: Tensor, running_statistics: bool = False) -> Tensor:
        """Latents of images: (B, 3, H, W) -> (B, N, codebook_dim).

        Args:
            images: in [-1, 1].
            running_statistics: with latent_norm "batch", use and keep the running statistics, also in training mode.
        """
        num_tokens, device = self.config.num_tokens, images.device
        patches = self.patchify(images)
        height, width = patches.shape[-2:]
        x = plain_norm(patches.flatten(2).transpose(1, 2))  # (B, P, D)
        if self.config.absolute_positions:
            x = x + axial_rotary(height, width, x.shape[-1], device=device).flatten(1).to(x.dtype)
        queries = self.query_proj(self.queries.weight[:num_tokens]).expand(len(images), -1, -1)
        x = torch.cat([x, queries.to(x.dtype)], dim=1)
        rotary = axial_rotary(height, width, self.config.head_dim, num_tokens, device)
        # true = may look: a query at the queries up to itself, all at all patches
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=device).tril()
        mask[:, : height * width] = True
        for block in self.blocks:
            x = run_block(block, x, rotary, mask, recompute=self.recompute)
        latents = self.to_latent(plain_norm(x[:, height * width :]))
        if (norm := self.latent_norm) is not None:
            flat = latents.flatten(1)
            flat = F.batch_norm(flat, norm.running_mean, norm.running_var) if running_statistics else norm(flat)
            latents = flat.view_as(latents)
        return latents
