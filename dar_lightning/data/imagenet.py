"""ImageNetDataModule: WebDataset shards, ImageNet's or any others, with labels or without, as uint8 batches."""

from typing import get_args

import numpy as np

from dar_lightning.data.bad_samples import Skipped
from dar_lightning.data.decode import BadSample
from dar_lightning.data.image_dataset import Crop, ShardDataset, describe, read_label
from dar_lightning.data.loader import StreamDataModule
from dar_lightning.data.remote import MOST_PATIENCE, PATIENCE
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import MOST_PIXELS, UserError, check_range, require


class ImageNetDataModule(StreamDataModule):
    """Photos of any kind, ImageNet's or your own, out of WebDataset shards (`KEY.jpg|png|webp`, `KEY.cls`).

    Batches are dictionaries: `image` (B, 3, S, S) uint8, `label` (B,) int64, -1 in shards without labels, `key` and
    `shard` (lists of B strings: where the picture comes from), `index` (B,) int64 (the sample's number in the order of
    the shards) and `valid` (B,) bool, False in validation for samples that only fill up: the last batch of a rank, and
    the places of bad samples. `transforms.to_float` brings images to [-1, 1] on the device.

    The same seed gives the same batches and pixels for any number of workers, and over any number of devices if the
    global batch is kept. Training drops the remainder of an epoch; validation has every sample once.

    Samples that cannot be used (lost with a damaged shard, no image in them, a label that is none) are skipped, named
    in the log and kept in `skipped`; in training another sample takes the place. Too many of them are an error.

    Args:
        train: Training shards: a folder, one tar, or a brace pattern such as `shards/{000000..000099}.tar`; or the URL
            (https, s3, ...) of a folder with an index.json, or of a pattern.
        val: Validation shards, likewise; always seen through the ADM centre crop.
        image_size: Side of the square crops, in pixels.
        batch_size: Samples per batch and device.
        num_workers: Worker processes that decode and crop; 0 does it in the training process.
        crop: Of training images. `adm`: random short side in [S, S / 0.8], random place (tokenizer); `ten_crop`: one
            of ten, at 1.1 S (AR); `center`.
        flip: Mirror half of the training images (`ten_crop` does so in any case).
        seed: Order, crops and flips.
        num_classes: Labels in the shards are 0 to num_classes - 1. Left out, it is the number of class names in the
            shards' index.
        classes: Use only these classes, by name or number; the first one becomes label 0, the next 1, and so on. All
            labels are read at the start; for ImageNet that is some minutes.
        cache_dir: Folder for copies of remote shards; each is copied when it is first needed.
        patience: Seconds for which the server of remote shards may be away or broken: a shard is tried for again, at
            last every 30 s. After that the run saves its step and stops. With several devices, less than the process
            group's timeout, for which the others wait.
        max_bad_share: Largest share of a split's samples that may be bad.
    """

    fixed = ("seed", "image_size", "crop", "flip")
    window = 16  # some 20,000 images of ImageNet
    sources = "a folder of shards or a pattern of them"

    def __init__(
        self,
        train: str | None = None,
        val: str | None = None,
        image_size: int = 256,
        batch_size: int = 32,
        num_workers: int = 0,
        crop: Crop = "adm",
        flip: bool = True,
        seed: int = 0,
        num_classes: int | None = None,
        classes: list[int | str] | None = None,
        cache_dir: str | None = None,
        max_bad_share: float = 0.01,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(train, val, batch_size, num_workers, seed)
        check_range(1, MOST_PIXELS, **{"data.image_size": image_size})
        check_range(1, **{"data.num_classes": num_classes})
        check_range(0, 1, **{"data.max_bad_share": max_bad_share})
        check_range(0, MOST_PATIENCE, **{"data.patience": patience})
        require(crop in get_args(Crop), f"data.crop: {crop!r} is none of {', '.join(get_args(Crop))}")
        if classes == []:
            raise UserError("data.classes: [] is empty")
        self.image_size, self.crop, self.flip = image_size, crop, flip
        self.cache_dir, self.patience, self.max_bad_share = cache_dir, patience, max_bad_share
        self._num_classes, self._classes = num_classes, classes
        self._skipped: dict[str, Skipped] = {}

    def _read_index(self, split: str, source: str) -> ShardIndex:
        index = ShardIndex.load(source, f"data.{split}", self.cache_dir, self.patience)
        skipped = self._skipped[split] = Skipped(f"data.{split}", index.num_samples, self.max_bad_share)
        skipped.add(index.lost)
        skipped.check()
        self._index[split] = index
        if self._classes is not None:
            require(index.labelled, f"data.classes: {source} has no labels, so there is nothing to choose by")
            self._kept()  # so that a class which is none is found here
        return index

    @property
    def skipped(self) -> dict[str, dict[str, str]]:
        """The bad samples met so far: split -> "shard/key" -> reason; those of other ranks since they last compared."""
        return {split: skipped.reasons for split, skipped in self._skipped.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty if the shards have no index."""
        names = self._any_index.classes
        return names if self._classes is None or not names else tuple(names[number] for number in self._kept())

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        count = self._classes_in_shards if self._classes is None else len(self._classes)
        if count is None:
            lack = "index.json with class names, so give the number" if self._any_index.labelled else "labels"
            raise UserError(f"data.num_classes: the shards have no {lack}")
        return count

    @property
    def _classes_in_shards(self) -> int | None:
        return self._num_classes or len(self._any_index.classes) or None

    def _kept(self) -> list[int]:
        """The numbers in the shards of the classes that are kept."""
        names, count = self._any_index.classes, self._classes_in_shards
        numbers = [names.index(given) if given in names else given for given in self._classes]
        for given, number in zip(self._classes, numbers, strict=True):
            if type(number) is not int or number < 0 or (count is not None and number >= count):
                right = f"0 to {count - 1}" if count else "0, 1, ..."
                known = ", ".join(names[:5]) or "no names are known"
                raise UserError(f"data.classes: {given!r} is no class, they are {right} ({known})")
        require(len(set(numbers)) == len(numbers), f"data.classes: {self._classes} names a class twice")
        return numbers

    def _dataset(self, split: str) -> ShardDataset:
        training, reader, skipped = split == "train", ShardReader(self.index(split)), self._skipped[split]
        if self._classes is None:
            numbers, labels = np.arange(len(reader)), {}
            count = self.num_classes if self.index(split).labelled else 0
        else:
            labels = {number: label for label, number in enumerate(self._kept())}
            kept, unlabelled, count = [], [], self._classes_in_shards
            for number in range(len(reader)):
                try:
                    if read_label(reader.read(number, only=("cls",))[2], count) in labels:
                        kept.append(number)
                except BadSample as bad:
                    unlabelled.append(describe(reader, number, bad))
            numbers = np.array(kept, np.int64)
            skipped.total = len(kept) + len(unlabelled)  # the latter could be of any class
            skipped.add(unlabelled)
            skipped.check()
            if not kept:
                raise UserError(f"data.classes: {getattr(self, split)} has no sample of {self._classes}")
        crop, flip = (self.crop, self.flip) if training else ("center", False)
        return ShardDataset(
            reader, numbers, labels, count, self.image_size, crop, flip, self.seed, replace=training, skipped=skipped
        )

    def teardown(self, stage: str) -> None:
        """Called by the Trainer at the end, on all ranks: what they have met since they last compared counts, too."""
        everywhere = self.trainer is not None and self.trainer.world_size > 1
        for split in self.splits:
            if stage == "fit" or split == "val":
                self.index(split)  # no rank may be without
                self._skipped[split].check(everywhere)
