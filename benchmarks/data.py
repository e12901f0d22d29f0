"""How fast one core makes training pictures, against ADM's recipe written with Pillow.

Both take encoded JPEGs and give what a loader's worker hands over, one picture after the other in one thread:

- `plain` is the recipe of ADM's `image_datasets.py`: decode, box halvings of the whole image while it is at least twice
  too large, bicubic of the whole image, crop, flip, float32 in [-1, 1].
- `ours` is what ImageNetDataModule does with `crop: adm`: draft decoding, then the same steps, as uint8.

The crops are the same ones. Repetitions of the two alternate, and the ratio is the median of those of neighbours, so
that a busy machine slows both. The pictures are photographs of fruit64, laid over each other at all scales with a
little noise, so that the JPEGs have about as many bytes as those of cameras; these decide how long decoding takes.

    python benchmarks/data.py [--repetitions 15] [--output benchmarks/results/data.json]
"""

import argparse
import io
import json
import math
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor

from dar_lightning.data import transforms
from dar_lightning.data.decode import decode_rgb
from dar_lightning.files import write_text

ROOT = Path(__file__).parents[1]
SIZE = 256
# width, height, JPEG quality, pictures, the ratio to reach
CASES = [(500, 375, 95, 24, 1.7), (2000, 1500, 80, 6, 4.0), (2000, 1500, 90, 6, None), (2000, 1500, 95, 6, None)]


def photographs() -> list[Image.Image]:
    """The pictures of fruit64's first shard."""
    with tarfile.open(min((ROOT / "data/fruit64/train").glob("*.tar"))) as tar:
        return [decode_rgb(tar.extractfile(member).read()) for member in tar if member.name.endswith(".jpg")]


def scene(photos: list[Image.Image], width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """Photographs at all scales over each other, the smaller the weaker, as in nature; and a sensor's noise."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    side, strength = max(width, height), 0.8
    while side >= 16:
        rows = [
            np.concatenate([tile(photos, side, generator) for _ in range(-(-width // side))], axis=1)
            for _ in range(-(-height // side))
        ]
        layer = np.concatenate(rows)[:height, :width]
        total += strength * (layer if side == max(width, height) else layer - layer.mean(axis=(0, 1)))
        side, strength = side // 2, strength / 2
    total += generator.normal(0, 3, (height, width, 1))
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def tile(photos: list[Image.Image], side: int, generator: np.random.Generator) -> np.ndarray:
    """One of the photographs as a square: (side, side, 3) float32."""
    photo = photos[generator.integers(len(photos))]
    return np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)


def jpeg(image: Image.Image, quality: int) -> bytes:
    """Encoded with Pillow's defaults: 4:2:0, baseline."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality)
    return content.getvalue()


def plain(content: bytes, generator: np.random.Generator) -> np.ndarray:
    """ADM's recipe: (3, S, S) float32 in [-1, 1]."""
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
    """What ImageNetDataModule does in training: (3, S, S) uint8."""
    image = decode_rgb(content, draft_size=transforms.max_short_side(SIZE))
    return transforms.random_flip(transforms.random_crop(image, SIZE, generator), generator)


def seconds(recipe: Callable, contents: list[bytes]) -> float:
    """Per picture."""
    start = time.perf_counter()
    for number, content in enumerate(contents):
        recipe(content, np.random.default_rng(number))
    return (time.perf_counter() - start) / len(contents)


def differences(contents: list[bytes]) -> np.ndarray:
    """Of the two recipes' pixels, absolute, in levels of 255."""
    pairs = []
    for number, content in enumerate(contents):
        expected = (plain(content, np.random.default_rng(number)) + 1) * 127.5
        pairs.append(np.abs(ours(content, np.random.default_rng(number)).numpy() - expected))
    return np.stack(pairs)


def measure(photos: list[Image.Image], case: tuple, repetitions: int) -> dict:
    """One row of the table."""
    width, height, quality, count, goal = case
    generator = np.random.default_rng(0)
    contents = [jpeg(scene(photos, width, height, generator), quality) for _ in range(count)]
    error = differences(contents)  # which also warms up
    times = [(seconds(plain, contents), seconds(ours, contents)) for _ in range(repetitions)]
    ratios = [slow / fast for slow, fast in times]
    return {
        "image": f"{width}x{height}",
        "quality": quality,
        "kilobytes": round(statistics.mean(map(len, contents)) / 1000),
        "plain_images_per_second": round(1 / statistics.median(slow for slow, _ in times), 1),
        "our_images_per_second": round(1 / statistics.median(fast for _, fast in times), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "goal": goal,
        "mean_absolute_error_levels": round(float(error.mean()), 3),
        "psnr_db": round(10 * math.log10(255**2 / float((error**2).mean())), 1),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores"


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/data.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    photos = photographs()
    rows = [measure(photos, case, arguments.repetitions) for case in CASES]
    result = {
        "what": f"training pictures of {SIZE} pixels per second and core",
        "processor": processor(),
        "other_load": round(load, 2),  # processes that were running when this began
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        "repetitions": arguments.repetitions,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    print(
        f"{result['processor']}, load {load:.1f} before the start, torch {torch.__version__}, Pillow {PIL.__version__}"
    )
    for row in rows:
        goal = f" (goal {row['goal']})" if row["goal"] else ""
        print(
            f"{row['image']:>9}, {row['kilobytes']:4} kB: {row['plain_images_per_second']:6} -> "
            f"{row['our_images_per_second']:6} images/s, ratio {row['ratio']:.2f}{goal}; pixels differ by "
            f"{row['mean_absolute_error_levels']} of 255 levels ({row['psnr_db']} dB)"
        )


if __name__ == "__main__":
    main()
