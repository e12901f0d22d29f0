"""Crops of PIL images, as in ADM and LlamaGen, and the way between uint8 pixels and [-1, 1].

The crops give uint8: normalising is left to the device (`to_float`), which takes a quarter of the memory traffic.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Box = Image.Resampling.BOX
Bicubic = Image.Resampling.BICUBIC


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale an image to a short side of `size`: box halvings while it is at least twice too large, then bicubic.

    Source: ADM (openai/guided-diffusion, `image_datasets.py`), whose crops the paper's recipe uses.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Box)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Bicubic)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM centre crop: short side scaled to `size`, then the middle square of `size` pixels."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """ADM random crop: short side scaled to a random integer in [size, size / 0.8], then any square of `size`."""
    image = resize_short_side(image, int(generator.integers(size, math.ceil(size / 0.8) + 1)))
    left = int(generator.integers(image.width - size + 1))
    top = int(generator.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Mirror left and right, half of the times."""
    return flip(image) if generator.integers(2) else image


def flip(image: Image.Image) -> Image.Image:
    """Mirror left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def ten_crop(image: Image.Image, size: int, number: int) -> Image.Image:
    """One of the ten crops of LlamaGen's AR recipe.

    The ADM centre crop of 1.1 `size` is taken first; of that square, numbers 0 to 4 are the corners (top left, top
    right, bottom left, bottom right) and the middle, 5 to 9 the same ones mirrored, in torchvision's order.
    """
    large = int(size * 1.1)
    image = center_crop(image, large)
    if number >= 5:
        # the mirror comes before the crop, so crop 5 shows what was at the top right
        image = flip(image)
    far, middle = large - size, round((large - size) / 2)
    left, top = ((0, 0), (far, 0), (0, far), (far, far), (middle, middle))[number % 5]
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float pixels, clipped to [-1, 1] and rounded to the nearest of 256 steps -> uint8, any shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
