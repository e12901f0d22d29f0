"""No condition: unconditional images, from photos without labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dar_lightning.ar.conditions.interface import Condition, Prefix


class NoCondition(Condition):
    """One place with one learned vector. A batch (B,) holds nothing but its length; it is label 0 of 1.

    Args:
        dim: width of the model.
    """

    takes = "nothing"
    num_labels = 1

    def __init__(self, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(1, dim)

    def forward(self, batch: Tensor) -> Prefix:
        return Prefix(self.embedding.weight.expand(len(batch), 1, -1))

    def null(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.embedding.weight.device)

    def from_data(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.zeros_like(batch["label"])
