"""Shards to be damaged, and what a DataModule gives of them."""

import io
import tarfile
from pathlib import Path

import pytest
from tiny_shards import CLASSES, SIZES, sample

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import ShardIndex, write_shard

BOTH = pytest.mark.parametrize("workers", [0, 2])


def module(folder: Path, workers: int = 0, **options) -> ImageNetDataModule:
    common = {"image_size": 16, "batch_size": 4, "num_workers": workers, "num_classes": 4, "max_bad_share": 0.9}
    return ImageNetDataModule(str(folder), str(folder), **common | options)


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


def write_set(folder: Path, sizes=SIZES) -> list[str]:
    """Shards 0.tar, 1.tar, ... of numbered pictures, with an index; their shard/key."""
    numbers = iter(range(sum(sizes)))
    names, entries = [], []
    for i, size in enumerate(sizes):
        samples = [sample(next(numbers)) for _ in range(size)]
        entries.append(write_shard(folder / f"{i}.tar", samples))
        names += [f"{i}.tar/{key}" for key, _ in samples]
    ShardIndex(folder, tuple(entries), CLASSES).save()
    return names


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    """A tar of anything, in the given order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(content) if header.isreg() else 0
            tar.addfile(header, io.BytesIO(content))


def link(name: str, target: str) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = tarfile.SYMTYPE, target
    return header
