"""Numbered pictures for shards made on the fly."""

import io

import numpy as np
from PIL import Image

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
