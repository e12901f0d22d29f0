"""Pictures to look at: labelled grids and film strips of uint8 images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
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


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_path(path) as part:
        image.save(part, format="PNG")
