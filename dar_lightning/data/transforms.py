"""Crops of PIL images; uint8 pixels to [-1, 1] and back.

The crops give uint8: normalising is left to the device (`to_float`), which takes a quarter of the memory traffic.
`center_crop` and `ten_crop` have ADM's pixels to the bit. `random_crop`, where the time of training goes, scales with
torch's vectorised kernel, which is several times faster than Pillow's; pixels differ by rounding (two levels at most).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Picture = Image.Image | Tensor  # RGB image, or (3, H, W) uint8
MAX_ASPECT = 16  # a strip of 1x10000 pixels, scaled to a short side of 256, would take 2 GB


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale an image to a short side of `size`: box halvings while it is at least twice too large, then bicubic.

    Source: ADM (openai/guided-diffusion, `image_datasets.py`), whose crops the paper's recipe uses.
    """
    image, scaled = _halved(image, size)
    return image.resize(scaled, Image.Resampling.BICUBIC)


def _halved(image: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """An image after ADM's halvings; and its width and height when its short side is scaled to `size`."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


def _trimmed(image: Image.Image, place: float) -> Image.Image:
    """Cut a strip to `MAX_ASPECT` times its short side, from its left or upper end (place 0) to the other one (1)."""
    longest = MAX_ASPECT * min(image.size)
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = round(place * (image.width - width)), round(place * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM centre crop: short side scaled to `size`, then the middle square of `size` pixels."""
    image = resize_short_side(_trimmed(image, 0.5), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def max_short_side(size: int) -> int:
    """The largest short side that `random_crop` scales to; `decode_rgb` needs no `draft_size` above it."""
    return math.ceil(size / 0.8)


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Tensor:
    """ADM random crop (3, size, size) uint8: short side scaled to [size, size / 0.8] at random, then any square."""
    side = int(generator.integers(size, max_short_side(size) + 1))
    if max(image.size) > MAX_ASPECT * min(image.size):
        image = _trimmed(image, generator.random())
    image, (width, height) = _halved(image, side)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W), as interpolate likes it: H, W, 3
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]
    left = int(generator.integers(width - size + 1))
    top = int(generator.integers(height - size + 1))
    return pixels[:, top : top + size, left : left + size].contiguous()


def random_flip(image: Picture, generator: np.random.Generator) -> Picture:
    """Mirror left and right, half of the times."""
    return flip(image) if generator.integers(2) else image


def flip(image: Picture) -> Picture:
    """Mirror left and right."""
    return image.flip(-1) if isinstance(image, Tensor) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def ten_crop(image: Image.Image, size: int, number: int) -> Image.Image:
    """One of the ten crops of LlamaGen's AR recipe; see `one_of_ten`."""
    return one_of_ten(ten_crop_square(image, size), size, number)


def ten_crop_square(image: Image.Image, size: int) -> Image.Image:
    """The square that `ten_crop` cuts from: the ADM centre crop of 1.1 `size`."""
    return center_crop(image, int(size * 1.1))


def one_of_ten(square: Image.Image, size: int, number: int) -> Image.Image:
    """A crop of a square: 0 to 4 are the corners (top left, top right, bottom left, bottom right) and the middle.

    5 to 9 are the same ones of the mirrored square, in torchvision's order: 5 shows what was at the top right.
    """
    if number >= 5:
        square = flip(square)
    far, middle = square.width - size, round((square.width - size) / 2)
    left, top = ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))[number % 5]
    return square.crop((left, top, left + size, top + size))


def to_tensor(image: Picture) -> Tensor:
    """RGB image -> (3, H, W) uint8; pixels that `random_crop` has brought there already stay."""
    return image if isinstance(image, Tensor) else torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float pixels, clipped to [-1, 1] and rounded to the nearest of 256 steps -> uint8, any shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
