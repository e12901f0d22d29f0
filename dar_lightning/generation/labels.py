"""LabelsDataModule: class labels for `dar predict`, in fixed ranges of images per rank."""

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, StackDataset

from dar_lightning.errors import UserError


class PieceSampler(DistributedSampler):
    """The numbers of one rank's pieces, in order; a DistributedSampler, so that Lightning leaves it in place."""

    def __init__(self, dataset: Dataset, pieces: list[range]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.numbers = [number for piece in pieces for number in piece]

    def __iter__(self):
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class LabelsDataModule(L.LightningDataModule):
    """Class-balanced labels for `dar predict` with `generation.predict.GenerationModule`.

    The images are numbered; which class number i has depends on i alone. A piece is a fixed range of numbers, all of
    one rank; `missing` holds those still to be drawn, which the `SampleWriter` reduces to what is not there yet.

    Args:
        num_images: how many in all; a multiple of the number of classes has equally many of each.
        per_class: instead of num_images, how many of each class.
        classes: the classes; None takes all that the pipeline knows.
        batch_size: images that a rank draws at a time. No image depends on it.
        piece_size: images in a piece. A run that is killed loses the pieces that it was drawing.
    """

    def __init__(
        self,
        num_images: int | None = None,
        per_class: int | None = None,
        classes: list[int] | None = None,
        batch_size: int = 64,
        piece_size: int = 256,
    ) -> None:
        super().__init__()
        if (num_images is None) == (per_class is None):
            raise UserError(f"num_images is {num_images} and per_class {per_class}: give one of the two")
        given = {"num_images": num_images, "per_class": per_class, "batch_size": batch_size, "piece_size": piece_size}
        for name, value in given.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: must be at least 1")
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise UserError(f"classes is {classes}: name each class once, or leave it out for all")
        self.num_images, self.per_class, self.classes = num_images, per_class, classes
        self.batch_size, self.piece_size = batch_size, piece_size
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more ranks than pieces that are missing

    def setup(self, stage: str) -> None:
        num_classes = getattr(self.trainer.lightning_module, "num_classes", None)
        if num_classes is None:
            name = type(self.trainer.lightning_module).__name__
            raise UserError(f"model is {name}, which draws nothing: LabelsDataModule needs GenerationModule")
        classes = list(range(num_classes)) if self.classes is None else self.classes
        if not 0 <= min(classes) <= max(classes) < num_classes:
            raise UserError(f"classes is {classes}: this pipeline has 0 to {num_classes - 1}")
        self.count = self.per_class * len(classes) if self.num_images is None else self.num_images
        self.labels = torch.tensor(classes).repeat(-(-self.count // len(classes)))[: self.count]  # image i: i mod m
        self.pieces = [range(i, min(i + self.piece_size, self.count)) for i in range(0, self.count, self.piece_size)]
        self.missing = self.pieces

    @property
    def protocol(self) -> dict[str, Any]:
        """What the images are of, for JSON; after setup."""
        of = "num_classes" if self.classes is None else f"{len(self.classes)} of {self.classes}"
        return {"classes": f"balanced: image i is of class i mod {of}", "n": self.count}

    def predict_dataloader(self) -> DataLoader:
        """This rank's part of the missing pieces: {"index": (B,), "label": (B,)} int64."""
        dataset = StackDataset(index=torch.arange(self.count), label=self.labels)
        mine = self.missing[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(dataset, batch_size=self.batch_size, sampler=PieceSampler(dataset, mine))
