"""Class labels as the condition (the paper): a learned vector a class, and one for "no class"; and no condition."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dar_lightning.ar.conditions.interface import Condition, Prefix
from dar_lightning.errors import UserError, require


class ClassLabel(Condition, nn.Embedding):
    """One place: the row of the label in a table of num_classes + 1 vectors, of which the last is "no class".

    Args:
        dim: width of the model.
        num_classes: labels are 0..num_classes - 1.
    """

    takes = "labels"

    def __init__(self, dim: int, num_classes: int = 1000):
        nn.Embedding.__init__(self, num_classes + 1, dim)
        self.num_labels = num_classes

    def forward(self, batch: Tensor) -> Prefix:
        return Prefix(nn.Embedding.forward(self, batch)[:, None])

    def null(self, count: int) -> Tensor:
        return torch.full((count,), self.num_labels, device=self.weight.device)

    def from_data(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["label"]

    def check(self, batch: Tensor) -> None:
        check_labels(batch, self.num_labels)

    def check_data(self, data: Any) -> None:
        for split in data.splits:
            need = "set config.condition to none, or make shards of a folder per class"
            said = f"data.{split}: its images have no labels, which condition 'class' needs: {need}"
            require(data.index(split).labelled, said)
        named = data.num_classes
        if named and named != self.num_labels:  # too many would train to the end, and then fit no names
            raise UserError(f"num_classes is {self.num_labels} in the config: the data names {named} classes")
        for split in data.splits:
            data.index(split).check_labels(self.num_labels)


class NoCondition(Condition):
    """Unconditional images: one learned vector. A batch (B,) holds nothing but its length; it is label 0 of 1."""

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


def check_labels(labels: Tensor, num_classes: int) -> None:
    """UserError for labels (B,) outside 0..num_classes; the last one is "no class"."""
    first, last = map(int, labels.aminmax()) if len(labels) else (0, 0)
    require(0 <= first <= last <= num_classes, f"labels are from {first} to {last}: need 0 to {num_classes - 1}")
