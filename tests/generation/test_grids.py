"""image_grid puts every pixel where it belongs; what animations are made of."""

import numpy as np
import pytest
import torch
from PIL import Image

from dar_lightning.generation.grids import MIN_SIDE, PAD, blend, image_grid, mosaic, save_png


def noise(rows: int, columns: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (rows, columns, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(MIN_SIDE, MIN_SIDE, 1), (32, 48, 3), (20, 20, 5), (MIN_SIDE - 1, 200, 2)],
)
def test_pixels_without_labels(height, width, factor):
    images = noise(2, 3, height, width)
    drawn = np.asarray(image_grid(images))
    cell_h, cell_w = height * factor + PAD, width * factor + PAD
    assert drawn.shape == (PAD + 2 * cell_h, PAD + 3 * cell_w, 3)
    white = np.ones(drawn.shape[:2], dtype=bool)
    for row in range(2):
        for column in range(3):
            top, left = PAD + row * cell_h, PAD + column * cell_w
            tile = drawn[top : top + height * factor, left : left + width * factor]
            enlarged = np.kron(images[row, column].permute(1, 2, 0).numpy(), np.ones((factor, factor, 1), np.uint8))
            assert np.array_equal(tile, enlarged)
            white[top : top + height * factor, left : left + width * factor] = False
    assert (drawn[white] == 255).all()


def test_labels_stand_beside_the_images_and_not_on_them():
    images = noise(2, 3, MIN_SIDE, MIN_SIDE)
    plain, labelled = (
        np.asarray(image_grid(images, *labels)) for labels in ((), (["red", "a longer name"], ["one", "two", "three"]))
    )
    height, width = plain.shape[0] - PAD, plain.shape[1] - PAD
    assert np.array_equal(labelled[-height:, -width:], plain[-height:, -width:])
    above, beside = labelled[:-height], labelled[-height:, :-width]
    assert (above < 128).any()
    for row in range(2):
        band = beside[row * (MIN_SIDE + PAD) : (row + 1) * (MIN_SIDE + PAD)]
        assert (band < 128).any(), "each row has its own label"
    assert (beside[:, :PAD] == 255).all(), "a long label is not cut"


def test_save_png_whole_or_not_at_all(tmp_path):
    image = image_grid(noise(1, 1, 8, 8))
    save_png(image, tmp_path / "x.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.asarray(image))
    with pytest.raises(AttributeError):
        save_png(None, tmp_path / "y.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


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
