"""The ADM npz is numpy's own file, and is written without holding it."""

import numpy as np
import pytest

from dar_lightning.generation.npz import write_npz


def test_it_is_what_numpy_writes_whatever_the_pieces(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    labels = np.arange(10)
    path, numpys, again = (tmp_path / f"{name}.npz" for name in "abc")
    digest = write_npz(path, np.split(images, [3, 3, 8]), images.shape, labels)
    with np.load(path) as found:
        assert found.files == ["arr_0", "labels"]
        assert np.array_equal(found["arr_0"], images)
        assert np.array_equal(found["labels"], labels)
    np.savez(numpys, arr_0=images, labels=labels)
    assert path.stat().st_size == numpys.stat().st_size, "neither is compressed"
    assert write_npz(again, [images], images.shape, labels) == digest
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "piece", [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((3, 4, 5, 3), np.uint8), np.zeros((3, 4, 4, 3), np.float32)]
)
def test_other_images_than_announced_leave_no_file(piece, tmp_path):
    with pytest.raises(ValueError, match="need"):
        write_npz(tmp_path / "a.npz", [piece], (3, 4, 4, 3))
    assert list(tmp_path.iterdir()) == []
