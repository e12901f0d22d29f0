"""Image dataset over shards: decode and crop; bad samples are counted and replaced."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dar_lightning.data import transforms
from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.decode import BadSample, decode_rgb
from dar_lightning.data.sampler import Ticket, sample_generator
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import IMAGE_TYPES, data_sha256
from dar_lightning.errors import UserError

REPLACEMENTS = 1000  # samples that are tried in a bad one's place
NEEDED = (*IMAGE_TYPES, "cls")  # a sample may have other members, and large ones
Crop = Literal["adm", "ten_crop", "center"]


@dataclass(eq=False)
class ShardDataset(Dataset):
    """Decoded and cropped samples; an item is a function of its ticket alone.

    A bad sample gives an item too, so that batches stay equal on all ranks; its `skipped` is the `Bad` that says which
    and why. In training it is another sample in its place, drawn for (seed, epoch, sample); otherwise a black one that
    is not `valid`.
    """

    reader: ShardReader  # all samples of the split
    numbers: np.ndarray  # (n,) int64, those that the dataset consists of
    labels: dict[int, int]  # in the shards -> in the items, where it is another
    num_classes: int | None  # labels in the shards are below it; 0: there are none
    image_size: int  # side of the square crops
    crop: Crop  # as for ImageNetDataModule
    flip: bool
    seed: int  # of crops, flips and replacements
    replace: bool  # give other samples for bad ones
    skipped: Skipped  # where a loader takes note of them

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def data_sha256(self) -> str:
        """SHA-256 of the shards and of what their labels become."""
        return data_sha256(self.reader.index.shards, list(self.labels.items()))

    @property
    def sizes(self) -> list[int]:
        """Samples per shard."""
        ends = self.reader.ends
        return np.bincount(np.searchsorted(ends, self.numbers, side="right"), minlength=len(ends)).tolist()

    def __getitem__(self, ticket: Ticket | int) -> dict:
        ticket = Ticket(ticket) if isinstance(ticket, int) else ticket
        number = int(self.numbers[ticket.index])
        try:
            return self._item(number, ticket)
        except BadSample as bad:
            skipped = describe(self.reader, number, bad)
        if not self.replace:
            black = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
            shard, _, key = skipped.name.partition("/")
            item = {"image": black, "label": 0, "key": key, "shard": shard, "index": number, "valid": False}
            return item | {"skipped": skipped}
        generator = np.random.default_rng([2, self.seed, ticket.epoch, ticket.index])
        for other in self.numbers[generator.integers(len(self), size=REPLACEMENTS)]:
            try:
                return self._item(int(other), ticket) | {"skipped": skipped}
            except BadSample:  # named when its own turn comes
                continue
        raise UserError(f"{self.skipped.option}: of {REPLACEMENTS} samples none can be used, among them {skipped}")

    def _item(self, number: int, ticket: Ticket) -> dict:
        """A sample at the place of `ticket`, with the crop of that place."""
        shard, key, members = self.reader.read(number, only=NEEDED)
        label = read_label(members, self.num_classes)
        # at twice the size and more, ADM's recipe halves before it scales; a JPEG can leave that to its decoder
        draft = transforms.max_short_side(self.image_size) if self.crop == "adm" else None
        image, generator = decode(members, draft), sample_generator(self.seed, ticket.epoch, ticket.index)
        if self.crop == "ten_crop":
            image = transforms.ten_crop(image, self.image_size, int(generator.integers(10)))
        elif self.crop == "adm":
            image = transforms.random_crop(image, self.image_size, generator)
        else:
            image = transforms.center_crop(image, self.image_size)
        if self.flip and self.crop != "ten_crop":  # which holds the mirrored ones already
            image = transforms.random_flip(image, generator)
        return {
            "image": transforms.to_tensor(image),  # (3, S, S) uint8
            "label": self.labels.get(label, label),
            "key": key,
            "shard": shard,
            "index": number,
            "valid": ticket.valid,
            "skipped": Bad(),
        }


def decode(members: dict[str, bytes], draft_size: int | None = None) -> Image.Image:
    """The RGB image of a sample, by `decode_rgb`; a BadSample if it has none, or one that cannot be decoded."""
    for extension in IMAGE_TYPES:
        if extension in members:
            return decode_rgb(members[extension], draft_size)
    raise BadSample(f"no image ({', '.join(IMAGE_TYPES)})")


def read_label(members: dict[str, bytes], num_classes: int | None) -> int:
    """The class number of a sample, from its `.cls` member; a BadSample if it has none below num_classes.

    With num_classes 0, of shards without labels, it is -1.
    """
    if num_classes == 0:
        return -1
    if "cls" not in members:
        raise BadSample("no .cls member, which must hold its class number")
    text = members["cls"][:100].decode(errors="replace").strip()
    # int() takes more than digits, and more of them than int64 holds
    if not (text.isascii() and text.isdigit() and len(text) < 10) or (num_classes and int(text) >= num_classes):
        right = f"0 to {num_classes - 1}" if num_classes else "0, 1, ..."
        raise BadSample(f"its label is {text[:20]!r}, the classes are {right}")
    return int(text)


def describe(reader: ShardReader, number: int, bad: BadSample) -> Bad:
    """A bad sample by its name, with the reason in one line."""
    return Bad(reader.name(number), " ".join(str(bad).split()))
