"""Real bytes of every kind that image folders turn out to hold."""

import io
import resource
import struct
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from encoded import encode, picture, png
from PIL import Image

from dar_lightning.data.decode import MAX_PIXELS, BadSample, decode_rgb
from dar_lightning.data.prepare import packing

LOSSY = 12  # mean difference of levels that a JPEG of the test picture stays far below


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


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_whatever_the_name(kind):
    """The decoder is not told a name: a PNG that is called .jpg is a PNG."""
    assert np.array_equal(pixels(encode(picture(), kind)), picture())


def test_webp():
    assert np.array_equal(pixels(encode(picture(), "WEBP", lossless=True)), picture())
    assert distance(pixels(encode(picture(), "WEBP")), picture()) < LOSSY


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg(options):
    assert distance(pixels(encode(picture(), "JPEG", quality=95, **options)), picture()) < 3


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


def test_alpha_is_dropped():
    """What lies below it is shown, as in ADM; nothing is composed onto a colour of our choice."""
    layers = np.dstack([picture(), np.tile(np.arange(96, dtype=np.uint8), (64, 1))])
    assert np.array_equal(pixels(encode(Image.fromarray(layers), "PNG")), picture())
    grey = np.array(picture().convert("L"))
    layers = Image.fromarray(np.dstack([grey, 255 - grey]), "LA")
    assert np.array_equal(pixels(encode(layers, "PNG")), np.dstack([grey] * 3))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 4))], ids=["none", "index", "bytes"])
def test_palette(transparency):
    palette = picture().quantize(64)
    options = {} if transparency is None else {"transparency": transparency}
    assert np.array_equal(pixels(encode(palette, "PNG", **options)), palette.convert("RGB"))


def test_grey_and_two_colours():
    grey = picture().convert("L")
    assert np.array_equal(pixels(encode(grey, "PNG")), grey.convert("RGB"))
    assert distance(pixels(encode(grey, "JPEG", quality=95)), grey.convert("RGB")) < 3
    assert np.array_equal(pixels(encode(grey, "PNG", transparency=200)), grey.convert("RGB"))
    bits = grey.convert("1")
    assert np.array_equal(pixels(encode(bits, "PNG")), np.dstack([np.array(bits) * 255] * 3))


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "LA", "RGBA"])
def test_16_bits_are_scaled_and_not_clipped(color, channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    values[0, 0], values[0, 1] = 65535, 300  # which would be 255 when clipped, and is 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    upper = (values >> 8).astype(np.uint8)
    expected = np.dstack([upper[..., 0]] * 3) if channels < 3 else upper[..., :3]
    assert np.array_equal(pixels(png(7, 5, 16, color, rows)), expected)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_tiff(mode):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    order = ">u2" if mode == "I;16B" else "<u2"
    content = encode(Image.frombytes(mode, (32, 32), values.astype(order).tobytes()), "TIFF")
    assert np.array_equal(pixels(content), np.dstack([(values >> 8).astype(np.uint8)] * 3))


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_32_bits_have_no_white(mode, dtype):
    values = np.linspace(0, 70000, 64).reshape(8, 8).astype(dtype)
    assert reason(encode(Image.fromarray(values, mode), "TIFF")) == "pixels of 32 bits"


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated = pixels(encode(picture(), "JPEG", exif=exif))
    assert rotated.shape == (64, 96, 3)
    assert np.array_equal(rotated, pixels(encode(picture(), "JPEG")))


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)], ids=str)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_extreme_shapes(size, kind):
    for draft_size in (None, 320):
        found = pixels(encode(picture(*size), kind), draft_size=draft_size)
        assert found.shape == (size[1], size[0], 3)
        assert distance(found, picture(*size)) < LOSSY


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_first_frame_of_an_animation(kind, options):
    first = picture().quantize(64).convert("RGB")
    others = [Image.new("RGB", first.size, color) for color in ("red", "lime")]
    content = encode(first, kind, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.array_equal(pixels(content), first)


def test_phones_that_put_two_pictures_into_a_jpeg():
    content = encode(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64), "red")])
    assert np.array_equal(pixels(content), pixels(encode(picture(), "JPEG")))


# ---- drafts


@pytest.mark.parametrize(
    ("draft_size", "expected"),
    [(241, (640, 480)), (240, (320, 240)), (121, (320, 240)), (120, (160, 120)), (9, (80, 60))],
)
def test_drafts_are_never_smaller_than_asked(draft_size, expected):
    image = picture(640, 480)
    draft = decode_rgb(encode(image, "JPEG", quality=95), draft_size)
    assert draft.size == expected
    assert distance(np.array(draft), image.resize(expected, Image.Resampling.BOX)) < 2


def test_only_jpegs_have_drafts():
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF"):
        content = encode(picture(), kind)
        assert np.array_equal(pixels(content, draft_size=8), pixels(content))


def test_drafts_of_other_modes():
    for mode in ("L", "CMYK"):
        content = encode(picture(640, 480).convert(mode), "JPEG", quality=95)
        whole = decode_rgb(content).resize((160, 120), Image.Resampling.BOX)
        assert distance(pixels(content, draft_size=120), whole) < 2


# ---- bad ones


def test_what_is_no_image():
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    vector = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # Pillow would start Ghostscript for it
    for content in (b"", b"\xff", b"\xff\xd8\xff", page, vector, script, b"\x80\x04K\x01.", bytes(5000)):
        assert reason(content) == "not an image of a known format"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated(kind):
    content = encode(picture(), kind)
    for share in (0.3, 0.6, 0.9):
        assert reason(content[: int(share * len(content))])


def test_jpegs_cut_at_the_very_end():
    content = encode(picture(), "JPEG")
    for cut in (1, 2, 20, len(content) // 2):
        assert "truncated" in reason(content[:-cut]).lower()
    assert np.array_equal(pixels(content + b"more"), pixels(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_broken_bytes_raise_nothing_else(kind):
    """Bytes overwritten at random, in the header and behind it: an image or a BadSample, and soon."""
    content = encode(picture(), kind)
    generator = np.random.default_rng(0)
    reasons = []
    start = time.monotonic()
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
    assert time.monotonic() - start < 60, "hangs"


def test_no_pixels():
    assert reason(png(0, 5, 8, 2, b""))
    assert reason(b"GIF89a" + struct.pack("<HH", 0, 0) + bytes(3) + b";")


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


def test_bombs_are_refused_by_their_header():
    """Where Pillow refuses them too, unless another library told it not to."""
    bombs = [png_bomb(), jpeg_bomb(), png(30_000, 30_000, 8, 6, b""), png(13_400, 13_400, 8, 2, b"")]
    assert len(bombs[0]) < 200_000
    before = peak_memory()
    for bomb in bombs:
        assert reason(bomb).endswith("more than 178956970 pixels")
    assert MAX_PIXELS == 178_956_970
    assert peak_memory() - before < 50 * 2**20
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns from half of it on
        assert "truncated" in reason(png(13_377, 13_377, 1, 0, b""))  # just below the limit, and no rows


def test_large_pictures_are_no_warnings():
    content = encode(Image.new("L", (9500, 9500)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packing.encode(content, None, 95) == ("png", content)


def test_bombs_are_refused_whatever_pillow_was_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason(jpeg_bomb()) == "30000x30000: more than 178956970 pixels"


def test_a_webp_bomb():
    """WebP knows no more than 16383 pixels a side; the reader may reserve memory for them, but must not touch it."""
    content = bytearray(encode(picture(), "WEBP", lossless=True))
    start = content.index(b"VP8L") + 9  # after the signature byte: 14 bits of width - 1, 14 bits of height - 1
    (bits,) = struct.unpack("<I", content[start : start + 4])
    content[start : start + 4] = struct.pack("<I", bits & ~0xFFFFFFF | 16_382 << 14 | 16_382)
    before = peak_memory()
    assert reason(bytes(content)) == "more than 178956970 pixels"
    assert peak_memory() - before < 50 * 2**20
