"""Which of an image's ten crops the DataModule gives, and what that depends on."""

from collections import Counter
from functools import cache
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_shards import picture
from torch import Tensor
from torchvision.transforms import TenCrop
from torchvision.transforms.functional import pil_to_tensor

from dar_lightning.data.imagenet import ImageNetDataModule

SIZE = 20  # of a square of 22 pixels: its corners and its middle are five different crops


@cache
def ten(number: int) -> list[Tensor]:
    """All crops of a picture, by Pillow and torchvision: 40x48 pixels at 1.1 SIZE, of that the middle square."""
    square = picture(number).resize((22, 26), Image.Resampling.BICUBIC).crop((0, 2, 22, 24))
    return [pil_to_tensor(crop) for crop in TenCrop(SIZE)(square)]


def make(shards: Path, **options) -> ImageNetDataModule:
    common = {"image_size": SIZE, "batch_size": 2, "crop": "ten_crop", "seed": 3}
    return ImageNetDataModule(str(shards), **common | options)


def taken(data: ImageNetDataModule, samples: int) -> list[tuple[int, int]]:
    """The first samples of training, or the next ones: the picture's number, and which of its crops is shown."""
    loader = data.train_dataloader()
    found = []
    for batch in islice((batch for _ in count() for batch in loader), samples // data.batch_size):
        for number, key, image in zip(batch["index"].tolist(), batch["key"], batch["image"], strict=True):
            assert key == f"photo-{number:03d}"
            (crop,) = (crop for crop, expected in enumerate(ten(number)) if torch.equal(image, expected))
            found.append((number, crop))
    return found


def test_every_sample_is_one_of_its_ten_crops(shards):
    """`flip` has no say: half of the ten are mirrored."""
    assert all(len({crop.numpy().tobytes() for crop in ten(number)}) == 10 for number in range(26))
    found = taken(make(shards), 4 * 26)
    epochs = [dict(found[start : start + 26]) for start in range(0, len(found), 26)]
    assert all(sorted(epoch) == [*range(26)] for epoch in epochs)
    assert all(3 <= times <= 20 for times in Counter(crop for _, crop in found).values())
    assert {crop for _, crop in found} == {*range(10)}
    for one, other in pairwise(epochs):
        assert sum(one[number] == other[number] for number in range(26)) < 9, "a sample's crop changes"
    assert taken(make(shards, flip=False), 4 * 26) == found


def test_the_choice_is_of_seed_epoch_and_sample_alone(shards):
    found = taken(make(shards), 2 * 26)
    assert taken(make(shards, num_workers=2), 2 * 26) == found
    assert taken(make(shards, batch_size=13), 2 * 26) == found
    crops, others = (dict(samples[:26]) for samples in (found, taken(make(shards, seed=4), 26)))
    assert sum(crops[number] == others[number] for number in range(26)) < 9


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch(shards, workers):
    """26 samples in batches of 4 are epochs of 6: the tenth batch is in the second epoch, the last two in the third."""
    whole = taken(make(shards, batch_size=4), 56)
    killed = make(shards, batch_size=4, num_workers=workers)
    assert taken(killed, 36) == whole[:36]
    resumed = make(shards, batch_size=4, num_workers=2 - workers)
    resumed.load_state_dict(killed.state_dict())
    assert taken(resumed, 20) == whole[36:]
