"""Crops against torchvision and against the ADM recipe written out in numpy coordinates."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import TenCrop
from torchvision.transforms import functional as F

from dar_lightning.data import transforms


def photo(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([128 + 100 * np.sin(rows / 9 + c) * np.cos(columns / (7 + c)) for c in range(3)], -1)
    return Image.fromarray(waves.astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (81, 64), (200, 133), (131, 500), (40, 30), (256, 256)])
def test_center_crop_is_adm(size):
    image = photo(*size)
    expected = image
    while min(*expected.size) >= 2 * 64:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.Resampling.BOX)
    scale = 64 / min(*expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(expected)
    y, x = (pixels.shape[0] - 64) // 2, (pixels.shape[1] - 64) // 2
    assert np.array_equal(np.array(transforms.center_crop(image, 64)), pixels[y : y + 64, x : x + 64])


@pytest.mark.parametrize("size", [64, 33, 256])
def test_ten_crop_is_torchvision_on_the_larger_centre_crop(size):
    image = photo(300, 400)
    expected = TenCrop(size)(transforms.center_crop(image, int(size * 1.1)))
    for number in range(10):
        assert np.array_equal(np.array(transforms.ten_crop(image, size, number)), np.array(expected[number]))


def test_random_crop_scales_and_places_uniformly():
    """The position of the crop is read off a ramp; the scale off its slope."""
    size = 50
    columns = np.broadcast_to(np.arange(0, 250, 250 / 100, dtype=np.float32), (100, 100))
    ramp = Image.fromarray(columns.astype(np.uint8)).convert("RGB")
    generator = np.random.default_rng(0)
    sides, places = [], []
    for _ in range(600):
        crop = np.array(transforms.random_crop(ramp, size, generator), dtype=np.float64)[25, :, 0]
        assert crop.shape == (size,)
        side = 250 * (size - 11) / (crop[-6] - crop[5])  # a side's worth of ramp, by the slope inside
        sides.append(side)
        places.append(crop[5] / 250 - 5 / side)
    assert 49 < min(sides) < 51.5
    assert 61 < max(sides) < math.ceil(size / 0.8) + 1.5
    assert abs(np.mean(sides) - (50 + 63) / 2) < 1
    assert 0.05 < np.mean(places) < 0.15  # mean of (1 - size / side) / 2 is 0.06, in parts of the side


def test_flip_is_fair_and_mirrors():
    image = photo(20, 10)
    generator = np.random.default_rng(0)
    results = [np.array(transforms.random_flip(image, generator)) for _ in range(200)]
    mirrored = [np.array_equal(result, np.array(image)[:, ::-1]) for result in results]
    assert 70 < sum(mirrored) < 130
    assert all(flip or np.array_equal(result, np.array(image)) for flip, result in zip(mirrored, results, strict=True))


def test_pixels_round_trip():
    image = photo(17, 9)
    tensor = transforms.to_tensor(image)
    assert torch.equal(tensor, F.pil_to_tensor(image))
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(transforms.to_uint8(transforms.to_float(levels)), levels)
    assert transforms.to_float(levels).aminmax() == (-1, 1)
    assert torch.allclose(transforms.to_float(levels), (levels / 255 - 0.5) / 0.5, atol=1e-6)
    assert transforms.to_uint8(torch.tensor([-3.0, 0.0039, 0.0041, 9.0])).tolist() == [0, 128, 128, 255]
    assert transforms.to_uint8(torch.tensor([0.0], dtype=torch.bfloat16)).tolist() == [128]  # 127.5 rounds to even
