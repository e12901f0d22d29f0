"""The dataset of `dar extract`: all crops of every image. Worker processes import it, so it does without Lightning."""

import json
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from dar_lightning.data import transforms
from dar_lightning.data.bad_samples import Bad
from dar_lightning.data.captions import MEMBERS, read_captions
from dar_lightning.data.decode import BadSample
from dar_lightning.data.image_dataset import NEEDED, decode, describe, read_label
from dar_lightning.data.sampler import sample_generator
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex

Crops = Literal["center", "center_flip", "ten_crop", "random"]
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")  # the order of transforms.ten_crop


@dataclass(frozen=True)
class Views:
    """Which crops are taken of every image; see `dar extract`."""

    crops: Crops
    random_crops: int  # their number, if they are random
    size: int  # their side in pixels
    seed: int  # of random crops; each is a function of the seed, its number and the sample's

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
        if self.crops == "ten_crop":
            square = transforms.ten_crop_square(image, self.size)  # scaled once for all ten
            views = [transforms.one_of_ten(square, self.size, number) for number in range(10)]
        elif self.crops == "random":
            generators = [sample_generator(self.seed, number, sample) for number in range(self.random_crops)]
            views = [transforms.random_flip(transforms.random_crop(image, self.size, g), g) for g in generators]
        else:
            middle = transforms.center_crop(image, self.size)
            views = [middle, transforms.flip(middle)][: len(self)]
        return torch.stack([transforms.to_tensor(view) for view in views])


class ViewBatches(Dataset):
    """Batches of images with all their views, from the shards of these numbers, in order.

    A batch never crosses the edge of a shard: what shares a forward pass, and so each token to the last bit, depends
    neither on the number of devices nor on where an earlier run was interrupted.

    An item is a dictionary: `views` (B, V, 3, S, S) uint8, `label` (B,), -1 in shards without labels, `key` (list),
    `captions` (list: those of an image in JSON), `flaw` (a `Bad` of B names and B reasons; views of bad samples are
    black), `shard` (its number) and `last` (whether the shard ends here). With `captioned`, an image without a caption
    is bad.
    """

    def __init__(
        self, index: ShardIndex, numbers: list[int], views: Views, batch_size: int, captioned: bool = False
    ) -> None:
        self.reader, self.views, self.captioned = ShardReader(index), views, captioned
        self.num_classes = (len(index.classes) or None) if index.labelled else 0
        self.batches = []  # shard, numbers of its samples in this batch, whether it is the last one
        for number in numbers:
            end = int(self.reader.ends[number])
            samples = range(end - index.shards[number].samples, end)
            parts = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
            self.batches += [(number, part, part.stop == end) for part in parts]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> dict:
        shard, samples, last = self.batches[position]
        return default_collate([self._sample(number) for number in samples]) | {"shard": shard, "last": last}

    def _sample(self, number: int) -> dict:
        try:
            _, key, members = self.reader.read(number, only=(*NEEDED, *MEMBERS))
            views, label = self.views.of(decode(members), number), read_label(members, self.num_classes)
            captions = read_captions(members)
            if self.captioned and not captions:
                raise BadSample("no caption")
        except BadSample as bad:
            black = torch.zeros(len(self.views), 3, self.views.size, self.views.size, dtype=torch.uint8)
            flaw = describe(self.reader, number, bad)
            return {"views": black, "label": -1, "key": "", "captions": "[]", "flaw": flaw}
        return {"views": views, "label": label, "key": key, "captions": json.dumps(captions), "flaw": Bad()}
