"""Mean metric per bin: loss by token group, accuracy by position."""

import torch
from torch import Tensor
from torchmetrics import Metric


class BinnedMean(Metric):
    """Mean of the values that fall into each of a number of bins, over all devices. Updates never wait for a GPU."""

    full_state_update = False

    def __init__(self, bins: int):
        super().__init__()
        self.add_state("sums", torch.zeros(bins), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, bins: Tensor, values: Tensor) -> None:
        """Add values of any shape, in bins (int64) of the same shape."""
        values = values.detach().float().flatten()
        self.sums.index_add_(0, bins.flatten(), values)
        self.counts.index_add_(0, bins.flatten(), torch.ones_like(values))

    def compute(self) -> Tensor:
        """(bins,) float32; NaN where nothing fell."""
        return self.sums / self.counts
