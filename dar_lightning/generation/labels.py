"""LabelsDataModule: class labels for `dar predict`, in fixed ranges of images per rank."""

from itertools import chain

import lightning as L
import torch
from torch.utils.data import DataLoader, DistributedSampler, StackDataset

from dar_lightning.errors import UserError, check_range


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
        check_range(1, num_images=num_images, per_class=per_class, batch_size=batch_size, piece_size=piece_size)
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise UserError(f"classes is {classes}: name each class once, or leave it out for all")
        self.num_images, self.per_class, self.classes = num_images, per_class, classes
        self.batch_size, self.piece_size = batch_size, piece_size
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more ranks than pieces that are missing

    def setup(self, stage: str) -> None:
        model = self.trainer.lightning_module
        if not hasattr(model, "num_classes"):
            raise UserError(
                f"model is {type(model).__name__}, which draws nothing: LabelsDataModule needs GenerationModule"
            )
        classes = list(range(model.num_classes)) if self.classes is None else self.classes
        if not 0 <= min(classes) <= max(classes) < model.num_classes:
            raise UserError(f"classes is {classes}: this pipeline has 0 to {model.num_classes - 1}")
        self.count = self.per_class * len(classes) if self.num_images is None else self.num_images
        self.labels = torch.tensor(classes).repeat(-(-self.count // len(classes)))[: self.count]  # image i: i mod m
        self.missing = self.pieces = [
            range(start, min(start + self.piece_size, self.count)) for start in range(0, self.count, self.piece_size)
        ]
        of = "num_classes" if self.classes is None else f"{len(classes)} of {classes}"
        self.protocol = {"classes": f"balanced: image i is of class i mod {of}", "n": self.count}  # for JSON

    def predict_dataloader(self) -> DataLoader:
        """This rank's part of the missing pieces: {"index": (B,), "label": (B,)} int64."""
        pieces = self.missing[self.trainer.global_rank :: self.trainer.world_size]
        mine = torch.tensor(list(chain(*pieces)), dtype=torch.int64)
        dataset = StackDataset(index=mine, label=self.labels[mine])
        in_order = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)  # Lightning leaves it in place
        return DataLoader(dataset, batch_size=self.batch_size, sampler=in_order)
