"""Odd picture files from the shard to the batch: the right pixels, or the sample's name and the reason in the log."""

import io
from functools import cache
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from damaged import BOTH, module
from encoded import encode, picture, png
from PIL import Image
from tiny_shards import CLASSES

from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.training.callbacks import Throughput

SIZE = 16
# The middle of these is cut out and not scaled; turned by an orientation tag, it would be another.
WIDE, TALL = picture(24, SIZE), picture(SIZE, 24)
BOMB = "more than 178956970 pixels"


def middle(image: Image.Image) -> np.ndarray:
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.array(image.convert("RGB"))[top : top + SIZE, left : left + SIZE]


def colour(*levels: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(levels), (SIZE, SIZE, 3))


def strip(width: int, height: int) -> Image.Image:
    """Red, but green where its middle is."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (max(0, width // 2 - 20), max(0, height // 2 - 20), width // 2 + 20, height // 2 + 20))
    return image


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def sixteen_bits(image: Image.Image) -> bytes:
    """An RGB PNG of 16 bits; the lower 8 are noise."""
    upper = np.array(image).astype(np.uint16) << 8
    values = upper + np.random.default_rng(0).integers(0, 256, upper.shape, dtype=np.uint16)
    return png(*image.size, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))


@cache
def good() -> dict[str, tuple[str, bytes, np.ndarray]]:
    """Key -> extension, file, and the pixels (16, 16, 3) of its centre crop."""
    high = {"quality": 95, "subsampling": 0}
    grey, palette = WIDE.convert("L"), WIDE.quantize(16)
    frames = [Image.new("RGB", WIDE.size, name) for name in ("red", "lime")]
    film = {"save_all": True, "append_images": frames}
    return {
        "plain": ("jpg", encode(WIDE, "JPEG", **high), middle(WIDE)),
        "png-named-jpg": ("jpg", encode(TALL, "PNG"), middle(TALL)),
        "jpeg-named-png": ("png", encode(TALL, "JPEG", **high), middle(TALL)),
        "cmyk": ("jpg", encode(WIDE.convert("CMYK"), "JPEG", quality=95), middle(WIDE)),
        "16-bit": ("png", sixteen_bits(WIDE), middle(WIDE)),
        "16-bit-grey": ("png", encode(Image.fromarray(np.array(grey).astype(np.uint16) * 257), "PNG"), middle(grey)),
        "exif-6": ("jpg", encode(WIDE, "JPEG", exif=turned(6), **high), middle(WIDE)),
        "exif-3": ("jpeg", encode(TALL, "JPEG", exif=turned(3), **high), middle(TALL)),
        "palette": ("png", encode(palette, "PNG", transparency=3), middle(palette)),
        "dot": ("png", encode(Image.new("RGB", (1, 1), (10, 200, 30)), "PNG"), colour(10, 200, 30)),
        "high-strip": ("png", encode(strip(1, 10_000), "PNG"), colour(0, 255, 0)),
        "long-strip": ("png", encode(strip(10_000, 1), "PNG"), colour(0, 255, 0)),
        "film": ("webp", encode(WIDE, "WEBP", lossless=True, **film), middle(WIDE)),
        "film-png": ("png", encode(TALL, "PNG", save_all=True, append_images=[TALL.rotate(180)]), middle(TALL)),
        "film-gif": ("png", encode(palette.convert("RGB"), "GIF", **film), middle(palette)),
    }


@cache
def bad() -> dict[str, tuple[str, bytes, str]]:
    """Key -> extension, file, and what its reason begins with."""
    return {
        "bomb": ("png", png(30_000, 30_000, 8, 2, b""), BOMB),
        "bomb-named-jpg": ("jpg", png(30_000, 30_000, 1, 0, b""), BOMB),
        "page": ("jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image of a known format"),
        "cut": ("jpg", encode(WIDE, "JPEG")[:-20], "damaged (image file is truncated"),
        "nothing": ("webp", b"", "not an image of a known format"),
    }


@pytest.fixture
def odd(tmp_path) -> tuple[Path, dict[str, str]]:
    """A folder with two shards of ten samples, both with good and bad ones; and key -> shard."""
    files = good() | bad()
    order = [*list(files)[::2], *list(files)[1::2]]
    members = {key: {files[key][0]: files[key][1], "cls": b"%d" % (i % 4)} for i, key in enumerate(order)}
    entries = [
        write_shard(tmp_path / f"{i}.tar", [(key, members[key]) for key in order[10 * i : 10 * (i + 1)]])
        for i in (0, 1)
    ]
    ShardIndex(tmp_path, tuple(entries), CLASSES).save()
    shard_of = {key: f"{i // 10}.tar" for i, key in enumerate(order)}
    return tmp_path, shard_of


def check_pixels(key: str, image: torch.Tensor) -> None:
    _, content, expected = good()[key]
    assert image.shape == (3, SIZE, SIZE)
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
    lossy = Image.open(io.BytesIO(content)).format == "JPEG"
    assert difference.mean() < 3 if lossy else difference.max() == 0, key


def check_skipped(found: dict[str, str], lines: list[str], shard_of: dict[str, str], split: str) -> None:
    """Each bad one by its shard, key and reason, and once in the log."""
    assert sorted(found) == sorted(f"{shard_of[key]}/{key}" for key in bad())
    for key, (_, _, reason) in bad().items():
        assert found[f"{shard_of[key]}/{key}"].startswith(reason)
    lines = [line for line in lines if "skipped" in line]
    assert sorted(lines) == sorted(f"data.{split}: skipped {name}: {reason}" for name, reason in found.items())


@BOTH
def test_validation(odd, workers, caplog):
    folder, shard_of = odd
    data = module(folder, workers)
    seen = []
    for batch in data.val_dataloader():
        for key, shard, image, valid in zip(*(batch[name] for name in ("key", "shard", "image", "valid")), strict=True):
            assert shard == shard_of[key]
            assert valid == (key in good())
            if valid:
                check_pixels(key, image)
                seen.append(key)
    assert seen == [key for key in shard_of if key in good()]
    check_skipped(data.skipped["val"], caplog.messages, shard_of, "val")


class Watching(L.LightningModule):
    """Trains nothing; looks at what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[str] = []

    def training_step(self, batch, batch_idx):
        for key, image in zip(batch["key"], batch["image"], strict=True):
            check_pixels(key, image)
        self.seen += batch["key"]
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@BOTH
@pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and loggers
def test_training_and_its_metric(odd, workers, caplog, tmp_path):
    folder, shard_of = odd
    data, model = module(folder, workers, crop="center", flip=False), Watching()
    trainer = L.Trainer(
        default_root_dir=tmp_path / "run",
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Throughput(flops=False)],
    )
    trainer.fit(model, datamodule=data)
    assert len(model.seen) == 20
    assert set(model.seen) == set(good())  # some of them twice, in the places of the bad ones
    assert trainer.callback_metrics["data/skipped"] == len(bad())
    check_skipped(data.skipped["train"], caplog.messages, shard_of, "train")
