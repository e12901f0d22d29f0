"""Image grids with labels, the frames of a stream's animation, and files of both."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dar_lightning.data.transforms import to_uint8
from dar_lightning.files import atomic_path

PAD, MIN_SIDE, FONT_SIZE = 4, 96, 13
LINE = FONT_SIZE + 2 * PAD  # height of a line of text
ACROSS = 4  # images in a row of an animation
BAR, WRITTEN, TO_COME = 8, "#2563eb", "#e5e7eb"  # height and colours of the bar of tokens


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W), uint8 or float in [-1, 1] -> an image."""
    pixels = pixels if pixels.dtype == torch.uint8 else to_uint8(pixels)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def image_grid(
    images: Tensor,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draw images in rows and columns on white; small images are enlarged by a whole factor, so pixels stay sharp.

    Args:
        images: (rows, columns, 3, H, W) uint8.
        row_labels: one text per row, written to its left.
        column_labels: one text per column, written above.
        captions: one text per column, written below.
    """
    factor = max(1, -(-MIN_SIDE // min(images.shape[-2:])))
    tiles = images.cpu().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    tiles = F.pad(tiles, (0, PAD, 0, PAD), value=255)  # (rows, columns, 3, h, w)
    height, width = tiles.shape[-2:]
    font = ImageFont.load_default(FONT_SIZE)
    left = PAD + max((int(font.getlength(text)) + 2 * PAD for text in row_labels or ()), default=0)
    top, bottom = PAD + (LINE if column_labels else 0), LINE if captions else 0
    block = to_image(tiles.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2))
    canvas = Image.new("RGB", (left + block.width, top + block.height + bottom), "white")
    canvas.paste(block, (left, top))
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(row_labels or ()):
        draw.text((PAD, top + row * height + height // 2), text, fill="black", font=font, anchor="lm")
    for column, text in enumerate(column_labels or ()):
        draw.text((left + column * width + width // 2, PAD), text, fill="black", font=font, anchor="mt")
    for column, text in enumerate(captions or ()):
        draw.text((left + column * width + width // 2, top + block.height), text, fill="black", font=font, anchor="ma")
    return canvas


def mosaic(images: Tensor) -> Image.Image:
    """Images (n, 3, H, W) uint8 in a block that is about as wide as high; the last row may have gaps."""
    columns = math.ceil(math.sqrt(len(images)))
    gaps = -len(images) % columns
    filled = torch.cat([images, images.new_full((gaps, *images.shape[1:]), 255)])
    return image_grid(filled.unflatten(0, (-1, columns)))


def stream_frames(strips: Tensor, names: Sequence[str], counts: Sequence[int], steps: int) -> list[Image.Image]:
    """Frames of an animation in which pictures sharpen while a bar below them fills with tokens.

    Args:
        strips: (n, K, 3, H, W) uint8, the previews of n images.
        names: n texts, written under the images.
        counts: K numbers of tokens, after which each preview is there.
        steps: frames from one preview to the next, the first of which shows it as it is and the others fade.

    Returns:
        (K - 1) * steps + 1 frames, four images to a row.
    """
    across = min(len(strips), ACROSS)
    gaps = -len(strips) % across
    films = torch.cat([strips, strips.new_full((gaps, *strips.shape[1:]), 255)]).unflatten(0, (-1, across))
    texts = [[*names, *[""] * gaps][first : first + across] for first in range(0, len(strips), across)]
    faded = blend(films.movedim(2, 0), steps)  # (frames, rows, across, 3, H, W)
    tokens = np.interp(np.arange(len(faded)) / steps, range(len(counts)), counts)
    frames = []
    for images, count in zip(faded, tokens.astype(int).tolist(), strict=True):
        rows = [image_grid(row[None], captions=text) for row, text in zip(images, texts, strict=True)]
        width, height = rows[0].size
        frame = Image.new("RGB", (width, height * len(rows) + BAR + LINE + PAD), "white")
        for number, row in enumerate(rows):
            frame.paste(row, (0, number * height))
        draw, top = ImageDraw.Draw(frame), height * len(rows)
        for colour, share in ((TO_COME, 1), (WRITTEN, count / counts[-1])):
            if end := round((width - 2 * PAD) * share):
                draw.rectangle((PAD, top, PAD + end - 1, top + BAR - 1), fill=colour)
        text, font = f"{count} of {counts[-1]} tokens", ImageFont.load_default(FONT_SIZE)
        draw.text((width // 2, top + BAR + PAD), text, fill="black", font=font, anchor="ma")
        frames.append(frame)
    return frames


def blend(images: Tensor, steps: int) -> Tensor:
    """Fade from each image to the next: (K, ...) uint8 -> ((K - 1) * steps + 1, ...), the K images among them."""
    lines = images.flatten(1).T[None].float()  # (1, values of an image, K)
    faded = F.interpolate(lines, size=(len(images) - 1) * steps + 1, mode="linear", align_corners=True)
    return faded[0].T.round().to(torch.uint8).unflatten(1, images.shape[1:])


def save_animation(frames: Sequence[Image.Image], path: Path, seconds: float) -> None:
    """Write a WebP that shows each frame for so long, the last one for 2 seconds, and begins again."""
    milliseconds = [round(1000 * seconds)] * (len(frames) - 1) + [2000]
    with atomic_path(path) as part:
        first, *others = frames
        first.save(part, format="WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=85)


def save_png(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with texts in its metadata."""
    chunks = PngInfo()
    for name, text in (texts or {}).items():
        chunks.add_text(name, text)
    with atomic_path(path) as part:
        image.save(part, format="PNG", pnginfo=chunks)
