"""Crops against torchvision and against the ADM recipe written out with Pillow and numpy coordinates."""

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


def adm(image: Image.Image, size: int, in_two: bool = False) -> np.ndarray:
    """An image with its short side scaled to `size` as in openai/guided-diffusion; `in_two` passes, rows first."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    width, height = (round(x * size / min(*image.size)) for x in image.size)
    if in_two:
        image = image.resize((width, image.height), resample=Image.Resampling.BICUBIC)
    return np.array(image.resize((width, height), resample=Image.Resampling.BICUBIC))


SHAPES = [(64, 64), (81, 64), (200, 133), (131, 500), (40, 30), (256, 256), (1024, 64)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_center_crop_is_adm(size):
    image = photo(*size)
    pixels = adm(image, 64)
    y, x = (pixels.shape[0] - 64) // 2, (pixels.shape[1] - 64) // 2
    assert np.array_equal(np.array(transforms.center_crop(image, 64)), pixels[y : y + 64, x : x + 64])


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("noise", [False, True])
def test_random_crop_is_adm_but_for_rounding(size, noise):
    """Noise has overshoots at black and white, which must be clipped and not wrapped.

    They are clipped between the two passes too. The horizontal one is done first, here and in older Pillows; newer ones
    begin with the vertical one where that is less work.
    """
    image = photo(*size)
    if noise:
        levels = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (size[1], size[0], 3))
        image = Image.fromarray(levels)
    differences = []
    for seed in range(8):
        draws = np.random.default_rng(seed)
        pixels = adm(image, draws.integers(64, 80 + 1), in_two=True).astype(int)
        x, y = (draws.integers(length - 64 + 1) for length in pixels.shape[1::-1])
        crop = transforms.random_crop(image, 64, np.random.default_rng(seed))
        assert (crop.shape, crop.dtype, crop.is_contiguous()) == ((3, 64, 64), torch.uint8, True)
        differences.append(np.abs(crop.permute(1, 2, 0).numpy() - pixels[y : y + 64, x : x + 64]))
    assert np.max(differences) <= 2
    assert np.mean(differences) < 0.05


@pytest.mark.parametrize("size", [(1, 10_000), (60_000, 3), (1, 1)], ids=str)
def test_strips_are_cut_before_they_are_scaled(size, monkeypatch):
    """60000x3 pixels at a short side of 256 would be 5120000x256."""
    areas = []

    def watched(original):
        def watch(image, to, *arguments, **options):
            areas.append(to[0] * to[1])
            return original(image, to, *arguments, **options)

        return watch

    monkeypatch.setattr(Image.Image, "resize", watched(Image.Image.resize))
    monkeypatch.setattr(transforms.F, "interpolate", watched(transforms.F.interpolate))
    rows, columns = np.mgrid[: size[1], : size[0]]
    ramp = Image.fromarray((255 * (rows + columns) / sum(size)).astype(np.uint8)).convert("RGB")
    middle = transforms.to_tensor(transforms.center_crop(ramp, 256)).float()
    crops = [transforms.random_crop(ramp, 256, np.random.default_rng(seed)) for seed in range(20)]
    assert {middle.shape, *(crop.shape for crop in crops)} == {(3, 256, 256)}
    assert transforms.ten_crop(ramp, 256, 9).size == (256, 256)
    assert 0 < max(areas) <= transforms.MAX_ASPECT * 320**2
    means = [float(crop.float().mean()) for crop in crops]
    if size != (1, 1):
        assert abs(float(middle.mean()) - 127.5) < 2
        assert min(means) < 64 < 192 < max(means), "from the whole strip"


@pytest.mark.parametrize("size", [64, 33, 256])
def test_ten_crop_is_torchvision_on_the_larger_centre_crop(size):
    image = photo(300, 400)
    expected = TenCrop(size)(transforms.center_crop(image, math.floor(size * 1.1)))
    for number in range(10):
        assert np.array_equal(np.array(transforms.ten_crop(image, size, number)), np.array(expected[number]))


class Extreme:
    """A generator that draws the smallest integers, or the largest ones."""

    def __init__(self, largest: bool):
        self.largest = largest

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        return high - 1 if self.largest else low


@pytest.mark.parametrize(("largest", "side"), [(False, 256), (True, 320)])
def test_crops_at_the_papers_size(largest, side):
    """Training: a short side of 256 to 320, both included. AR tokens: from the middle square of 281 pixels."""
    image = photo(400, 700)
    crop = transforms.random_crop(image, 256, Extreme(largest)).permute(1, 2, 0).numpy().astype(int)
    whole = adm(image, side).astype(int)
    expected = whole[-256:, -256:] if largest else whole[:256, :256]
    assert np.abs(crop - expected).max() <= 2
    assert transforms.ten_crop_square(image, 256).size == (281, 281)
    assert transforms.max_short_side(50) == 63  # of 62.5


def test_flip_is_fair_and_mirrors():
    """Pillow's images and pixels alike."""
    image = photo(20, 10)
    pixels = transforms.to_tensor(image)
    mirrored = []
    for seed in range(200):
        flipped, same = (transforms.random_flip(each, np.random.default_rng(seed)) for each in (image, pixels))
        assert torch.equal(transforms.to_tensor(flipped), same)
        mirrored.append(np.array_equal(np.array(flipped), np.array(image)[:, ::-1]))
        assert mirrored[-1] or torch.equal(same, pixels)
    assert 70 < sum(mirrored) < 130


def test_pixels_round_trip():
    image = photo(17, 9)
    assert torch.equal(transforms.to_tensor(image), F.pil_to_tensor(image))
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(transforms.to_uint8(transforms.to_float(levels)), levels)
    assert transforms.to_float(levels).aminmax() == (-1, 1)
    assert torch.allclose(transforms.to_float(levels), (levels / 255 - 0.5) / 0.5, atol=1e-6)
    assert transforms.to_uint8(torch.tensor([-3.0, 0.0039, 0.0041, 9.0])).tolist() == [0, 128, 128, 255]
    assert transforms.to_uint8(torch.tensor([0.0], dtype=torch.bfloat16)).tolist() == [128]  # 127.5 rounds to even
