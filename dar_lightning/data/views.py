"""All views of every image: what `dar extract` tokenizes, in batches that keep to the shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dar_lightning.data import transforms
from dar_lightning.data.bad_samples import Bad
from dar_lightning.data.decode import BadSample
from dar_lightning.data.image_dataset import NEEDED, decode, describe, read_label
from dar_lightning.data.sampler import sample_generator
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex

Crops = Literal["center", "center_flip", "ten_crop", "random"]
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")  # the order of transforms.ten_crop


@dataclass(frozen=True)
class Views:
    """Which crops are taken of every image.

    Args:
        crops: Their kind; see `dar extract`.
        random_crops: Their number if they are random.
        size: Their side in pixels.
        seed: Of random crops; each is a function of the seed, its number and the sample's.
    """

    crops: Crops
    random_crops: int
    size: int
    seed: int

    @property
    def names(self) -> list[str]:
        """What each position of the crops' axis is."""
        return {
            "center": ["center"],
            "center_flip": ["center", "center of the mirrored image"],
            "ten_crop": [*PLACES, *(f"{place} of the mirrored image" for place in PLACES)],
            "random": [f"random {number}" for number in range(self.random_crops)],
        }[self.crops]

    def __len__(self) -> int:
        return len(self.names)

    def of(self, image: Image.Image, sample: int) -> Tensor:
        """The views (V, 3, S, S) uint8 of an image, which is sample number `sample`."""
        return torch.stack([transforms.to_tensor(view) for view in self._cut(image, sample)])

    def _cut(self, image: Image.Image, sample: int) -> Iterator[transforms.Picture]:
        if self.crops == "ten_crop":
            square = transforms.ten_crop_square(image, self.size)  # scaled once for all ten
            yield from (transforms.one_of_ten(square, self.size, number) for number in range(10))
        elif self.crops == "random":
            for number in range(self.random_crops):
                generator = sample_generator(self.seed, number, sample)
                yield transforms.random_flip(transforms.random_crop(image, self.size, generator), generator)
        else:
            middle = transforms.center_crop(image, self.size)
            yield from (middle, transforms.flip(middle))[: len(self)]


class ViewBatches(Dataset):
    """Batches of images with all their views, from some of the shards, in order.

    A batch never crosses the edge of a shard: what shares a forward pass then depends neither on the number of devices
    nor on where an earlier run was interrupted, and so the tokens do not, to the last bit.

    An item is a dictionary: `views` (B, V, 3, S, S) uint8, `label` (B,), `key` (list), `flaw` (a `Bad` of B names
    and B reasons; views of bad samples are black), `shard` (its number) and `last` (whether the shard ends here).

    Args:
        index: The image shards.
        numbers: Which of them.
        views: What to take of each image.
        batch_size: Images per batch.
    """

    def __init__(self, index: ShardIndex, numbers: list[int], views: Views, batch_size: int) -> None:
        self.reader, self.views = ShardReader(index), views
        self.num_classes = len(index.classes) or None
        self.batches = []  # shard, number of the first sample, of the one after the last, whether the shard ends here
        for number in numbers:
            end = int(self.reader.ends[number])
            first = end - index.shards[number].samples
            for start in range(first, end, batch_size):
                self.batches.append((number, start, min(start + batch_size, end), start + batch_size >= end))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict:
        shard, start, stop, last = self.batches[position]
        return default_collate([self._sample(number) for number in range(start, stop)]) | {
            "shard": shard,
            "last": last,
        }

    def _sample(self, number: int) -> dict:
        try:
            _, key, members = self.reader.read(number, only=NEEDED)
            views, label = self.views.of(decode(members), number), read_label(members, self.num_classes)
        except BadSample as bad:
            black = torch.zeros(len(self.views), 3, self.views.size, self.views.size, dtype=torch.uint8)
            return {"views": black, "label": -1, "key": "", "flaw": describe(self.reader, number, bad)}
        return {"views": views, "label": label, "key": key, "flaw": Bad()}
