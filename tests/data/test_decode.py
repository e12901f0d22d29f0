"""Real bytes that are not what their name says, or not whole."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dar_lightning.data.decode import BadSample, decode_rgb


def encoded(kind: str, mode: str = "RGB", size=(40, 30), **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "LA"),
        ("WEBP", "RGBA"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
        ("PPM", "RGB"),
    ],
)
def test_every_mode_becomes_rgb(kind, mode):
    image = decode_rgb(encoded(kind, mode))
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_pixels_are_those_of_the_file():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(decode_rgb(encoded("PNG"))), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000)])
def test_odd_shapes(size):
    assert decode_rgb(encoded("PNG", size=size)).size == size


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_rgb(encoded("JPEG", exif=exif)).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    red, _, blue = decode_rgb(file.getvalue()).getpixel((4, 4))
    assert red > 200 > 50 > blue


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"<html></html>", "not an image"),
        (encoded("JPEG")[:-300], "damaged"),
        (encoded("PNG")[:500], "damaged"),
        (encoded("WEBP")[:200], "damaged|not an image"),
        (png_header(30_000, 30_000), "more than 178956970 pixels"),
    ],
    ids=["empty", "html", "jpeg", "png", "webp", "bomb"],
)
def test_what_cannot_be_used_says_why(content, reason):
    with pytest.raises(BadSample, match=reason) as error:
        decode_rgb(content)
    assert "object at" not in str(error.value), "the same reason in every run"
