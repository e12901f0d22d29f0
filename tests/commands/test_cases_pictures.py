"""Pictures as people have them are read alike by `dar shard`, `dar evaluate`, `--layout` and the page, or named."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_folders import encoded, read
from PIL import Image, PngImagePlugin

from dar_lightning.commands.shard import shard
from dar_lightning.data.decode import decode_rgb
from dar_lightning.errors import UserError
from dar_lightning.generation.editing import read_photo
from dar_lightning.metrics.images import open_images

GREY = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
PHOTO = np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)
COLORS = np.zeros((8, 8), np.uint8)


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def lying() -> bytes:
    """A photo that a phone stored on its side, and a tag which says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(Image.fromarray(np.ascontiguousarray(np.rot90(PHOTO))), exif=exif)


def of_shards(path: Path) -> np.ndarray:
    shard(str(path.parents[1]), str(path.parents[2] / "out"), workers=1)
    (sample,) = read(path.parents[2] / "out")
    return np.asarray(decode_rgb(sample[next(name for name in ("png", "jpg") if name in sample)]))


def of_evaluation(path: Path) -> np.ndarray:
    ((images, _),) = open_images(str(path.parent), "--samples", None).batches(1)
    return images[0].permute(1, 2, 0).numpy()


READERS = {
    "dar shard": of_shards,
    "dar evaluate": of_evaluation,
    "--layout, --image, --mask and the page": lambda path: np.asarray(read_photo(path, "layout")),
}
PICTURES = {
    "16 bits of grey": (png(Image.frombytes("I;16", (32, 32), GREY.tobytes())), np.dstack([GREY >> 8] * 3)),
    "on its side": (lying(), PHOTO),
    "a palette": (png(Image.fromarray(PHOTO[..., 0]).convert("P")), np.dstack([PHOTO[..., 0]] * 3)),
    "nothing on nothing": (png(Image.new("RGBA", (8, 8))), np.full((8, 8, 3), 255)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", PICTURES)
def test_one_reader_for_all(reader, kind, tmp_path):
    content, expected = PICTURES[kind]
    path = tmp_path / "in" / "cat" / "0.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert np.array_equal(READERS[reader](path), expected)


def bomb() -> bytes:
    """A PNG whose header says 30,000 x 30,000."""
    content = bytearray(encoded(0, "PNG"))
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def wordy() -> bytes:
    """A PNG with a compressed text of 100 MB."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 10**8, zip=True)
    return png(Image.fromarray(PHOTO), pnginfo=text)


@pytest.mark.parametrize(("make", "says"), [(bomb, "more than 178956970 pixels"), (wordy, r"damaged \(.*MAX_TEXT")])
def test_pictures_that_would_take_all_memory(make, says, tmp_path):
    path = tmp_path / "in" / "cat" / "0.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(make())
    with pytest.raises(UserError, match=f"^layout cannot be read: {says}"):
        read_photo(path, "layout")
    with pytest.raises(UserError, match=rf"^--samples: .*0\.png cannot be decoded \(.*{says}"):
        of_evaluation(path)
    with pytest.raises(UserError, match=rf"'cat/0\.png': {says}"):
        of_shards(path)
