"""Real bytes of every kind that image folders turn out to hold: the right pixels, or a reason in one line."""

import resource
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from encoded import encode, picture, png
from PIL import Image

from dar_lightning.data.decode import MAX_PIXELS, BadSample, decode_rgb
from dar_lightning.data.prepare import packing

LOSSY = 12  # mean difference of levels that a JPEG of the test picture stays far below
GREY, PALETTE = picture().convert("L"), picture().quantize(64)
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


@pytest.fixture(autouse=True)
def no_warnings():
    """Thousands of workers would repeat them for every epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def pixels(content: bytes, **options) -> np.ndarray:
    image = decode_rgb(content, **options)
    assert image.mode == "RGB"
    return np.array(image)


def distance(a: np.ndarray, b: np.ndarray | Image.Image) -> float:
    return float(np.abs(a.astype(int) - np.array(b).astype(int)).mean())


def reason(content: bytes) -> str:
    with pytest.raises(BadSample) as error:
        decode_rgb(content)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- good images


def layers(*planes: np.ndarray, mode: str | None = None) -> bytes:
    return encode(Image.fromarray(np.dstack(planes), mode), "PNG")


RAMP = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
FILM = {"save_all": True, "append_images": [Image.new("RGB", (96, 64), name) for name in ("red", "lime")]}
DOT, STRIP = (Image.new("RGB", size, (9, 99, 199)) for size in ((1, 1), (1, 10_000)))
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *((encode(picture(), kind), picture()) for kind in ("PNG", "BMP", "TIFF", "PPM")),
        (encode(picture(), "WEBP", lossless=True), picture()),
        # what lies below alpha is shown, as in ADM; nothing is composed onto a colour of our choice
        (layers(np.array(picture()), RAMP), picture()),
        (layers(np.array(GREY), RAMP, mode="LA"), GREY),
        (encode(PALETTE, "PNG"), PALETTE),
        (encode(PALETTE, "PNG", transparency=3), PALETTE),
        (encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 4))), PALETTE),
        (encode(GREY, "PNG"), GREY),
        (encode(GREY, "PNG", transparency=200), GREY),
        (encode(GREY.convert("1"), "PNG"), GREY.convert("1")),
        *((encode(picture(), kind, **FILM), picture()) for kind in ("PNG", "TIFF")),  # the first frame
        (encode(picture(), "WEBP", lossless=True, **FILM), picture()),
        (encode(PALETTE.convert("RGB"), "GIF", **FILM), PALETTE),
        # phones put two pictures into a JPEG; orientation tags are ignored; what lies behind the end, too
        (encode(picture(), "MPO", **FILM), decode_rgb(encode(picture(), "JPEG"))),
        (encode(picture(), "JPEG", exif=TURNED), decode_rgb(encode(picture(), "JPEG"))),
        (encode(picture(), "JPEG") + b"more", decode_rgb(encode(picture(), "JPEG"))),
        (encode(DOT, "PNG"), DOT),
        (encode(STRIP, "PNG"), STRIP),
    ],
)
def test_exact_pixels(content, expected):
    assert np.array_equal(pixels(content), expected.convert("RGB"))


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"quality": 95}, 3), ({"quality": 95, "progressive": True}, 3), ({"subsampling": 0}, LOSSY), ({}, LOSSY)],
    ids=str,
)
def test_lossy_formats(options, limit):
    assert distance(pixels(encode(picture(), "JPEG", **options)), picture()) < limit
    assert distance(pixels(encode(GREY, "JPEG", **options)), GREY.convert("RGB")) < limit
    assert distance(pixels(encode(picture(), "WEBP")), picture()) < LOSSY


def without_segment(jpeg: bytes, marker: int) -> bytes:
    start = jpeg.index(bytes([0xFF, marker]))
    (length,) = struct.unpack(">H", jpeg[start + 2 : start + 4])
    return jpeg[:start] + jpeg[start + 2 + length :]


def test_cmyk_jpegs():
    """Inks are stored inverted, as Adobe's programs do, with the APP14 segment that says so or without."""
    inks = np.array([(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)], dtype=np.uint8)
    blocks = np.broadcast_to(inks.repeat(16, 0), (16, 64, 4))
    expected = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)])  # red, green, black, white
    adobe = encode(Image.frombytes("CMYK", (64, 16), blocks.tobytes()), "JPEG", quality=95)
    plain = without_segment(adobe, 0xEE)
    assert b"Adobe" in adobe
    assert b"Adobe" not in plain
    for content in (adobe, plain):
        assert np.abs(pixels(content)[8, 8::16].astype(int) - expected).max() < 8


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "LA", "RGBA"])
def test_16_bits_are_scaled_and_not_clipped(color, channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    values[0, 0], values[0, 1] = 65535, 300  # which would be 255 when clipped, and is 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    upper = (values >> 8).astype(np.uint8)
    expected = np.dstack([upper[..., 0]] * 3) if channels < 3 else upper[..., :3]
    assert np.array_equal(pixels(png(7, 5, 16, color, rows)), expected)


@pytest.mark.parametrize(("mode", "order"), [("I;16", "<u2"), ("I;16B", ">u2")])
def test_16_bit_tiff(mode, order):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    content = encode(Image.frombytes(mode, (32, 32), values.astype(order).tobytes()), "TIFF")
    assert np.array_equal(pixels(content), np.dstack([(values >> 8).astype(np.uint8)] * 3))


# ---- drafts


@pytest.mark.parametrize(
    ("draft_size", "expected"),
    [(241, (640, 480)), (240, (320, 240)), (121, (320, 240)), (120, (160, 120)), (9, (80, 60))],
)
def test_drafts_are_never_smaller_than_asked(draft_size, expected):
    for mode in ("RGB", "L", "CMYK"):
        image = picture(640, 480).convert(mode)
        draft = decode_rgb(encode(image, "JPEG", quality=95), draft_size)
        assert draft.size == expected
        whole = decode_rgb(encode(image, "JPEG", quality=95)).resize(expected, Image.Resampling.BOX)
        assert distance(np.array(draft), whole) < 2


def test_only_jpegs_have_drafts():
    for kind in KINDS[1:]:
        content = encode(picture(), kind)
        assert np.array_equal(pixels(content, draft_size=8), pixels(content))


# ---- bad ones


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"\xff\xd8\xff",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript for it
        b"\x80\x04K\x01.",
        bytes(5000),
    ],
)
def test_what_is_no_image(content):
    assert reason(content) == "not an image of a known format"


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_32_bits_have_no_white(mode, dtype):
    values = np.linspace(0, 70000, 64).reshape(8, 8).astype(dtype)
    assert reason(encode(Image.fromarray(values, mode), "TIFF")) == "pixels of 32 bits"


def test_no_pixels():
    assert reason(png(0, 5, 8, 2, b""))
    assert reason(b"GIF89a" + struct.pack("<HH", 0, 0) + bytes(3) + b";")


@pytest.mark.parametrize("kind", KINDS)
def test_broken_bytes_raise_nothing_else(kind):
    """Cut off, or overwritten at random, in the header and behind it: an image or a BadSample."""
    content = encode(picture(), kind)
    for cut in (0.3, 0.6, 0.9):
        assert reason(content[: int(cut * len(content))])
    for cut in (1, 2, 20) if kind == "JPEG" else ():
        assert "truncated" in reason(content[:-cut]).lower()
    generator = np.random.default_rng(0)
    reasons = []
    for trial in range(150):
        broken = bytearray(content)
        for place in generator.integers(0, min(64, len(content)) if trial % 2 else len(content), 3):
            broken[place] = generator.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow tells of metadata that it cannot read
            try:
                assert decode_rgb(bytes(broken), 16).mode == "RGB"
            except BadSample as error:
                reasons.append(str(error))
    assert 0 < len(reasons) < 150
    assert all(reasons)


# ---- bombs


def peak_memory() -> int:
    """Most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def png_bomb() -> bytes:
    """900 million black pixels in some 110 kB."""
    side = 30_000
    squeeze = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    body = b"".join(squeeze.compress(row * 1000) for _ in range(side // 1000)) + squeeze.flush()
    small = png(side, side, 1, 0, b"")
    start = small.index(b"IDAT") - 4
    crc = zlib.crc32(b"IDAT" + body)
    return small[:start] + struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", crc) + small[-12:]


def jpeg_bomb(side: int = 30_000) -> bytes:
    """A small JPEG whose header says otherwise."""
    content = bytearray(encode(picture(), "JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", side, side)
    return bytes(content)


def webp_bomb() -> bytes:
    """WebP knows no more than 16383 pixels a side; the reader may reserve memory for them, but must not touch it."""
    content = bytearray(encode(picture(), "WEBP", lossless=True))
    start = content.index(b"VP8L") + 9  # after the signature byte: 14 bits of width - 1, 14 bits of height - 1
    (bits,) = struct.unpack("<I", content[start : start + 4])
    content[start : start + 4] = struct.pack("<I", bits & ~0xFFFFFFF | 16_382 << 14 | 16_382)
    return bytes(content)


def test_bombs_are_refused_by_their_header(monkeypatch):
    """Where Pillow refuses them too, unless another library told it not to."""
    bombs = [png_bomb(), jpeg_bomb(), webp_bomb(), png(30_000, 30_000, 8, 6, b""), png(13_400, 13_400, 8, 2, b"")]
    assert MAX_PIXELS == 178_956_970
    before = peak_memory()
    for bomb in bombs:
        assert reason(bomb).endswith("more than 178956970 pixels")
    assert peak_memory() - before < 50 * 2**20
    warnings.simplefilter("error")  # Pillow warns from half of it on
    assert "truncated" in reason(png(13_377, 13_377, 1, 0, b""))  # just below the limit, and no rows
    content = encode(Image.new("L", (9500, 9500)), "PNG")
    assert packing.encode(content, None, 95) == ("png", content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason(jpeg_bomb()) == "30000x30000: more than 178956970 pixels"
