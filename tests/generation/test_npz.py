"""The ADM npz is numpy's own file, and is written without holding it."""

import numpy as np
import pytest

from dar_lightning.generation.npz import write_npz


def test_it_is_what_numpy_writes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    labels = np.arange(10)
    write_npz(tmp_path / "a.npz", np.split(images, [3, 3, 8]), images.shape, labels)
    with np.load(tmp_path / "a.npz") as found:
        assert found.files == ["arr_0", "labels"]
        assert np.array_equal(found["arr_0"], images)
        assert np.array_equal(found["labels"], labels)
    np.savez(tmp_path / "numpy.npz", arr_0=images, labels=labels)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.npz", "numpy.npz")]
    assert sizes[0] == sizes[1], "neither is compressed"


def test_equal_images_give_equal_files_whatever_the_pieces(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    hashes = {write_npz(tmp_path / f"{m}.npz", np.split(images, m), images.shape) for m in (1, 2, 3)}
    assert len(hashes) == 1
    assert len({(tmp_path / f"{m}.npz").read_bytes() for m in (1, 2, 3)}) == 1


@pytest.mark.parametrize(
    "pieces",
    [[np.zeros((2, 4, 4, 3), np.uint8)], [np.zeros((3, 4, 5, 3), np.uint8)], [np.zeros((3, 4, 4, 3), np.float32)]],
    ids=["count", "size", "dtype"],
)
def test_other_images_than_announced_leave_no_file(pieces, tmp_path):
    with pytest.raises(ValueError, match="need"):
        write_npz(tmp_path / "a.npz", pieces, (3, 4, 4, 3))
    assert list(tmp_path.iterdir()) == []
