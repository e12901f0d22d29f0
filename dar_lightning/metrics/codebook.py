"""Codebook usage and perplexity."""

import torch
from torch import Tensor
from torchmetrics import Metric


class CodebookUse(Metric):
    """Share of codes that occur at least once, and perplexity of their distribution (1 to codebook_size)."""

    full_state_update = False

    def __init__(self, codebook_size: int):
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Count codes, int64 of any shape."""
        codes = codes.flatten()
        self.counts.scatter_add_(0, codes, torch.ones_like(codes))  # bincount would wait for a GPU

    def compute(self) -> tuple[Tensor, Tensor]:
        """(share used, from 0 to 1; perplexity)."""
        share = self.counts / self.counts.sum().clamp(min=1)
        return (self.counts > 0).float().mean(), (-torch.xlogy(share, share).sum()).exp()
