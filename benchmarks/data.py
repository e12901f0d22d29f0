"""How fast one core makes training pictures of JPEGs, against ADM's recipe written with Pillow; the same crops.

The JPEGs are photographs of fruit64, laid over each other at all scales with a little noise, so that they have about as
many bytes as those of cameras, which decide how long decoding takes.

    python benchmarks/data.py [--repetitions 15] [--output benchmarks/results/data.json]
"""

import io
import math
import statistics
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from benchmarks.machine import RESULTS, ROOT, in_turns, options, record
from dar_lightning.data import transforms
from dar_lightning.data.decode import decode_rgb
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex

SIZE = 256
# width, height, JPEG quality, pictures, the ratio to reach
CASES = [(500, 375, 95, 24, 1.7), (2000, 1500, 80, 6, 4.0), (2000, 1500, 90, 6, None), (2000, 1500, 95, 6, None)]


def scene(photos: list[Image.Image], width: int, height: int, quality: int, generator: np.random.Generator) -> bytes:
    """A JPEG of photographs at all scales over each other, the smaller the weaker, as in nature; and sensor noise."""
    total, largest = np.zeros((height, width, 3), dtype=np.float32), max(width, height)
    side, strength = largest, 0.8

    def tile() -> np.ndarray:
        photo = photos[generator.integers(len(photos))]
        return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)

    while side >= 16:
        rows = [np.concatenate([tile() for _ in range(-(-width // side))], axis=1) for _ in range(-(-height // side))]
        layer = np.concatenate(rows)[:height, :width]
        total += strength * (layer if side == largest else layer - layer.mean(axis=(0, 1)))
        side, strength = side // 2, strength / 2
    total += generator.normal(0, 3, (height, width, 1))
    content = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=quality)
    return content.getvalue()


def plain(content: bytes, generator: np.random.Generator) -> np.ndarray:
    """ADM's recipe, `image_datasets.py`: (3, S, S) float32 in [-1, 1]."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = int(generator.integers(SIZE, math.ceil(SIZE / 0.8) + 1))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (int(generator.integers(length - SIZE + 1)) for length in image.size)
    pixels = np.array(image)[top : top + SIZE, left : left + SIZE]
    if generator.integers(2):
        pixels = pixels[:, ::-1]
    return np.transpose(pixels.astype(np.float32) / 127.5 - 1, (2, 0, 1))


def ours(content: bytes, generator: np.random.Generator) -> Tensor:
    """What ImageNetDataModule does with `crop: adm`, draft decoding before the same steps: (3, S, S) uint8."""
    image = decode_rgb(content, draft_size=transforms.max_short_side(SIZE))
    return transforms.random_flip(transforms.random_crop(image, SIZE, generator), generator)


def all_of(recipe: Callable, contents: list[bytes]) -> np.ndarray:
    """(n, 3, S, S)"""
    return np.stack([recipe(content, np.random.default_rng(number)) for number, content in enumerate(contents)])


def measure(photos: list[Image.Image], case: tuple, repetitions: int) -> dict:
    """One row of the table."""
    width, height, quality, count, goal = case
    generator = np.random.default_rng(0)
    contents = [scene(photos, width, height, quality, generator) for _ in range(count)]
    error = np.abs(all_of(ours, contents) - (all_of(plain, contents) + 1) * 127.5)  # in levels of 255
    works = {"plain": lambda: all_of(plain, contents), "ours": lambda: all_of(ours, contents)}
    seconds = in_turns(works, least=repetitions)
    ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {
        "image": f"{width}x{height}",
        "quality": quality,
        "kilobytes": round(statistics.mean(map(len, contents)) / 1000),
        "plain_images_per_second": round(count / statistics.median(seconds["plain"]), 1),
        "our_images_per_second": round(count / statistics.median(seconds["ours"]), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "goal": goal,
        "mean_absolute_error_levels": round(float(error.mean()), 3),
        "psnr_db": round(10 * math.log10(255**2 / float((error**2).mean())), 1),
    }


if __name__ == "__main__":
    given = options(__doc__, repetitions=15, output=RESULTS / "data.json")
    torch.set_num_threads(1)
    reader = ShardReader(ShardIndex.load(ROOT / "data/fruit64/train"))
    photos = [decode_rgb(reader[number][2]["jpg"]) for number in range(256)]
    rows = (measure(photos, case, given.repetitions) for case in CASES)
    facts = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "pillow": PIL.__version__}
    facts |= {"libjpeg_turbo": features.version_feature("libjpeg_turbo"), "repetitions": given.repetitions}
    record(given.output, f"training pictures of {SIZE} pixels per second and core", rows, **facts)
