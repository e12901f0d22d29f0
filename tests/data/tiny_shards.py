"""Shards of numbered pictures, whole or to be damaged, and what a DataModule gives of them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import ShardIndex, write_shard

CLASSES = ("a", "b", "c", "d")
SIZES = (10, 9, 7)  # samples per shard


def picture(number: int) -> Image.Image:
    """A 40x48 picture of noise, another for each number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 40, 3), dtype=np.uint8))


def sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Key and members, as `write_shard` takes them."""
    png = io.BytesIO()
    picture(number).save(png, "PNG")
    return f"photo-{number:03d}", {"png": png.getvalue(), "cls": str(number % len(CLASSES)).encode()}


def write_set(folder: Path, sizes=SIZES, bad: frozenset[int] = frozenset()) -> list[str]:
    """Shards 000000.tar, ... with an index; the bad ones are no pictures. Returns shard/key of all."""
    numbers, names, entries = iter(range(sum(sizes))), [], []
    for i, size in enumerate(sizes):
        samples = [(number, *sample(number)) for _, number in zip(range(size), numbers, strict=False)]
        members = [(key, parts | {"png": b"x"} if number in bad else parts) for number, key, parts in samples]
        entries.append(write_shard(folder / f"{i:06d}.tar", members))
        names += [f"{i:06d}.tar/{key}" for key, _ in members]
    ShardIndex(folder, tuple(entries), CLASSES).save()
    return names


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    """A tar of anything, in the given order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(content) if header.isreg() else 0
            tar.addfile(header, io.BytesIO(content))


def module(train: Path | str, **options) -> ImageNetDataModule:
    """For training and validation."""
    common = {"image_size": 16, "batch_size": 4, "num_classes": 4, "seed": 3}
    return ImageNetDataModule(str(train), str(train), **common | options)


def validated(data: ImageNetDataModule) -> list[str]:
    """shard/key of the good samples that validation gives."""
    batches = list(data.val_dataloader())
    assert all(set(batch) == {"image", "label", "key", "shard", "index", "valid"} for batch in batches)
    return [
        f"{shard}/{key}"
        for batch in batches
        for shard, key, valid in zip(batch["shard"], batch["key"], batch["valid"], strict=True)
        if valid
    ]
