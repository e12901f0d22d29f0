"""Pictures to look at: labelled grids and film strips of uint8 images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dar_lightning.files import atomic_path

PAD, MIN_SIDE, FONT_SIZE = 4, 96, 13


def image_grid(
    images: Tensor, row_labels: Sequence[str] | None = None, column_labels: Sequence[str] | None = None
) -> Image.Image:
    """Draw images in rows and columns on white; small images are enlarged by a whole factor, so pixels stay sharp.

    Args:
        images: (rows, columns, 3, H, W) uint8.
        row_labels: one text per row, written to its left.
        column_labels: one text per column, written above.
    """
    rows, columns, _, height, width = images.shape
    factor = max(1, -(-MIN_SIDE // min(height, width)))
    cell_h, cell_w = height * factor + PAD, width * factor + PAD
    font = ImageFont.load_default(FONT_SIZE)
    left = PAD + max((int(font.getlength(text)) + 2 * PAD for text in row_labels or ()), default=0)
    top = PAD + (FONT_SIZE + 2 * PAD if column_labels else 0)
    canvas = Image.new("RGB", (left + columns * cell_w, top + rows * cell_h), "white")
    pixels = images.permute(0, 1, 3, 4, 2).cpu().numpy()  # (rows, columns, H, W, 3)
    for row in range(rows):
        for column in range(columns):
            tile = np.ascontiguousarray(pixels[row, column].repeat(factor, 0).repeat(factor, 1))
            canvas.paste(Image.fromarray(tile), (left + column * cell_w, top + row * cell_h))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels or ()):
        draw.text((PAD, top + row * cell_h + cell_h // 2), text, fill="black", font=font, anchor="lm")
    for column, text in enumerate(column_labels or ()):
        draw.text((left + column * cell_w + cell_w // 2, PAD), text, fill="black", font=font, anchor="mt")
    return canvas


def mosaic(images: Tensor) -> Image.Image:
    """Images (n, 3, H, W) uint8 in a block that is about as wide as high; the last row may have gaps."""
    columns = math.ceil(math.sqrt(len(images)))
    gaps = -len(images) % columns
    filled = torch.cat([images, images.new_full((gaps, *images.shape[1:]), 255)])
    return image_grid(filled.unflatten(0, (-1, columns)))


def blend(images: Tensor, steps: int) -> Tensor:
    """Fade from each image to the next: (K, ...) uint8 -> ((K - 1) * steps + 1, ...), the K images among them."""
    last = (len(images) - 1) * steps
    places = torch.arange(last + 1, dtype=torch.float64).div(steps)  # 0 to K - 1
    before = places.floor().long().clamp(max=max(len(images) - 2, 0))
    share = (places - before).view(-1, *[1] * (images.ndim - 1)).float()
    after = (before + 1).clamp(max=len(images) - 1)
    return (images[before].float() * (1 - share) + images[after].float() * share).round().to(torch.uint8)


def save_animation(frames: Sequence[Image.Image], path: Path, seconds: float) -> None:
    """Write a WebP that shows each frame for so long, the last one for 2 seconds, and begins again."""
    milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [2000]
    with atomic_path(path) as part:
        first, *others = frames
        first.save(part, format="WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=85)


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG whole or not at all, with texts in its metadata."""
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_text(name, text)
    with atomic_path(path) as part:
        image.save(part, format="PNG", pnginfo=chunks)
