"""image_grid puts every pixel where it belongs; what animations are made of."""

import numpy as np
import pytest
import torch
from PIL import ImageColor

from dar_lightning.generation.grids import (
    BAR,
    LINE,
    MIN_SIDE,
    PAD,
    TO_COME,
    WRITTEN,
    blend,
    image_grid,
    mosaic,
    stream_frames,
)


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width", "factor"), [(96, 96, 1), (32, 48, 3), (20, 20, 5), (95, 200, 2)])
def test_pixels_without_labels(height, width, factor):
    images = noise(height, width)
    height, width = height * factor, width * factor
    expected = np.full((PAD + 2 * (height + PAD), PAD + 3 * (width + PAD), 3), 255, np.uint8)
    for row, column in np.ndindex(2, 3):
        top, left = PAD + row * (height + PAD), PAD + column * (width + PAD)
        enlarged = np.kron(images[row, column].permute(1, 2, 0).numpy(), np.ones((factor, factor, 1), np.uint8))
        expected[top : top + height, left : left + width] = enlarged
    assert np.array_equal(image_grid(images), expected)


def test_labels_stand_beside_the_images_and_not_on_them():
    images = noise(MIN_SIDE, MIN_SIDE)
    plain = np.asarray(image_grid(images))
    labelled = np.asarray(image_grid(images, ["red", "a longer name"], ["one", "two", "three"]))
    height, width = plain.shape[0] - PAD, plain.shape[1] - PAD
    assert np.array_equal(labelled[-height:, -width:], plain[-height:, -width:])
    above, beside = labelled[:-height], labelled[-height:, :-width]
    assert (above < 128).any()
    assert (beside[: MIN_SIDE + PAD] < 128).any()
    assert (beside[MIN_SIDE + PAD :] < 128).any(), "each row has its own label"
    assert (beside[:, :PAD] == 255).all(), "a long label is not cut"


def test_fading_from_one_image_to_the_next():
    images = torch.tensor([0, 100, 60], dtype=torch.uint8).view(3, 1, 1)
    assert blend(images, 4).flatten().tolist() == [0, 25, 50, 75, 100, 90, 80, 70, 60]
    assert torch.equal(blend(images, 1), images)
    assert torch.equal(blend(images[:1], 4), images[:1])


def test_a_mosaic_leaves_gaps_white():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 96, 96)
    pixels = np.asarray(mosaic(images))[..., 0]
    assert pixels.shape == (2 * 100 + 4, 2 * 100 + 4)
    assert [pixels[50, 50], pixels[50, 150], pixels[150, 50], pixels[150, 150]] == [0, 1, 2, 255]


def test_captions_stand_below_the_images():
    images = noise(MIN_SIDE, MIN_SIDE)
    plain, labelled = (np.asarray(image_grid(images, captions=texts)) for texts in (None, ["8", "16", "24 tokens"]))
    assert np.array_equal(labelled[:-LINE], plain)
    assert [(part < 128).any() for part in np.split(labelled[-LINE:, PAD:], 3, axis=1)] == [True] * 3


def test_an_animation_shows_pictures_in_rows_of_four_and_fills_its_bar():
    strips = torch.tensor([0, 100, 60]).view(1, 3, 1, 1, 1) + torch.arange(5).view(5, 1, 1, 1, 1)
    frames = stream_frames(strips.expand(5, 3, 3, 96, 96).to(torch.uint8), list("abcde"), [8, 16, 24], steps=4)
    pixels = [np.asarray(frame) for frame in frames]
    row = PAD + 100 + LINE
    assert pixels[0].shape == (2 * row + BAR + LINE + PAD, PAD + 4 * 100, 3)
    grey = [frame[50, 50, 0] for frame in pixels]
    assert grey == [0, 25, 50, 75, 100, 90, 80, 70, 60], "as blend"
    last = pixels[-1]
    assert [last[50, 50 + 100 * i, 0] for i in range(4)] == [60, 61, 62, 63]
    assert [last[row + 50, 50 + 100 * i, 0] for i in range(4)] == [64, 255, 255, 255], "gaps are white"
    bars = [frame[2 * row + 1, PAD:-PAD] for frame in pixels]
    blue = [(bar == ImageColor.getrgb(WRITTEN)).all(-1).mean() for bar in bars]
    assert np.allclose(blue, np.linspace(8, 24, 9) / 24, atol=0.003)
    assert (bars[0][-1] == ImageColor.getrgb(TO_COME)).all()
