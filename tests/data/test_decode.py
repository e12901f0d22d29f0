"""Real bytes of every kind that image folders turn out to hold: the right pixels, or a reason in one line."""

import io
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dar_lightning.data.decode import MAX_PIXELS, BadSample, decode_rgb
from dar_lightning.data.prepare import packing


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """Survives JPEG, and is not the same when mirrored or turned."""
    rows, columns = np.mgrid[:height, :width]
    planes = [255 * columns / width, 255 * rows / height, 128 + 100 * np.sin(columns / 9) * np.cos(rows / 7)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """A PNG put together by hand; `rows` has a filter byte before each row."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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


RAMP = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
FILM = {"save_all": True, "append_images": [Image.new("RGB", (96, 64), name) for name in ("red", "lime")]}
WORDS = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
UPPER = Image.fromarray((WORDS >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *((encode(picture(), kind), picture()) for kind in ("PNG", "BMP", "TIFF", "PPM")),
        (encode(picture(), "WEBP", lossless=True), picture()),
        (encode(Image.fromarray(np.dstack([picture(), np.full_like(RAMP, 255)])), "PNG"), picture()),  # nothing shows
        (encode(PALETTE, "PNG"), PALETTE),
        (encode(GREY, "PNG"), GREY),
        (encode(GREY.convert("1"), "PNG"), GREY.convert("1")),
        (encode(PALETTE.convert("RGB"), "GIF", **FILM), PALETTE),  # the first frame
        (encode(picture(), "MPO", **FILM), decode_rgb(encode(picture(), "JPEG"))),  # phones put two into a JPEG
        (encode(Image.frombytes("I;16", (32, 32), WORDS.tobytes()), "PPM"), UPPER),
        (encode(Image.frombytes("I;16", (32, 32), WORDS.tobytes()), "TIFF"), UPPER),
        (encode(Image.frombytes("I;16B", (32, 32), WORDS.byteswap().tobytes()), "TIFF"), UPPER),
    ],
)
def test_exact_pixels(content, expected):
    assert np.array_equal(pixels(content), expected.convert("RGB"))


def on_white(image: Image.Image, alpha: np.ndarray) -> np.ndarray:
    """By the formula."""
    share = np.asarray(alpha, float)[..., None] / 255
    return (share * np.asarray(image.convert("RGB"), float) + (1 - share) * 255).round()


@pytest.mark.parametrize(
    ("content", "image", "alpha"),
    [
        (encode(Image.fromarray(np.dstack([picture(), RAMP])), "PNG"), picture(), RAMP),
        (encode(Image.fromarray(np.dstack([GREY, RAMP])), "PNG"), GREY, RAMP),
        (encode(Image.fromarray(np.dstack([picture(), RAMP])), "WEBP", lossless=True, exact=True), picture(), RAMP),
        (encode(PALETTE, "PNG", transparency=3), PALETTE, 255 * (np.asarray(PALETTE) != 3)),
        (encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 4))), PALETTE, 4 * np.asarray(PALETTE)),
        (encode(GREY, "PNG", transparency=200), GREY, 255 * (np.asarray(GREY) != 200)),
    ],
    ids=["RGBA", "LA", "WebP", "one colour of a palette", "a palette's alpha", "one grey"],
)
def test_transparency_is_put_on_white(content, image, alpha):
    assert np.abs(pixels(content) - on_white(image, alpha)).max() <= 1


# How Pillow's own tool would turn it, by hand: value of the tag -> what is stored, for a picture that stands upright.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("tag", STORED)
def test_phone_photos_stand_upright(tag, kind):
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    stored = np.ascontiguousarray(STORED[tag](np.array(picture())))
    content = encode(Image.fromarray(stored), kind, exif=exif, **options)
    found = pixels(content)
    assert found.shape == (64, 96, 3)
    assert distance(found, picture()) < (2 if kind == "JPEG" else 0.01)
    assert pixels(content, draft_size=16).shape[0] < pixels(content, draft_size=16).shape[1]


def test_damaged_metadata_do_not_make_a_damaged_image():
    content = encode(picture(), "PNG", exif=b"Exif\0\0MM\0*nonsense")
    assert np.array_equal(pixels(content), np.array(picture()))


def test_a_turn_that_fails_leaves_no_picture_on_its_side(monkeypatch):
    """Of what reads the tag, only a lack of memory stops it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(picture(), "PNG", exif=exif)
    for name, error in (("transpose", ValueError("x")), ("transpose", MemoryError()), ("getexif", MemoryError())):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, name, mock.Mock(side_effect=error))
            if isinstance(error, MemoryError):
                with pytest.raises(MemoryError):
                    decode_rgb(content)
            else:
                assert reason(content) == "damaged (x)"


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["grey", "RGB", "LA", "RGBA"])
def test_16_bits_are_scaled_and_not_clipped(color, channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    values[0, 0], values[0, 1] = 65535, 300  # which would be 255 when clipped, and is 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    upper = (values >> 8).astype(np.uint8)
    expected = np.dstack([upper[..., 0]] * 3) if channels < 3 else upper[..., :3]
    alpha = upper[..., -1] if channels in (2, 4) else np.full((5, 7), 255)
    difference = np.abs(pixels(png(7, 5, 16, color, rows)) - on_white(Image.fromarray(expected), alpha))
    assert difference.max() <= (channels in (2, 4)), "composing rounds"


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
    for kind in KINDS[1:]:  # which have no drafts
        content = encode(picture(), kind)
        assert np.array_equal(pixels(content, draft_size=draft_size), pixels(content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *(
            (content, "not an image of a known format")
            for content in (
                b"",
                b"\xff\xd8\xff",
                b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript for it
                bytes(5000),
            )
        ),
        (encode(Image.fromarray(np.full((8, 8), 70_000, np.int32), "I"), "TIFF"), "pixels of 32 bits"),
        (encode(Image.fromarray(np.zeros((8, 8), np.float32), "F"), "TIFF"), "pixels of 32 bits"),
    ],
)
def test_what_is_no_image(content, expected):
    """Of 32 bits, nobody knows which one is white."""
    assert reason(content) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_broken_bytes_raise_nothing_else(kind):
    """No pixels, cut off, or overwritten at random, in the header and behind it: an image or a BadSample."""
    assert reason(png(0, 5, 8, 2, b""))
    content = encode(picture(), kind)
    for cut in (0.3, 0.6, 0.9):
        assert reason(content[: int(cut * len(content))])
    for cut in (1, 2, 20) if kind == "JPEG" else ():
        assert "truncated" in reason(content[:-cut]).lower()
    generator = np.random.default_rng(0)
    reasons = []
    for trial in range(80):
        broken = bytearray(content)
        for place in generator.integers(0, min(64, len(content)) if trial % 2 else len(content), 3):
            broken[place] = generator.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow tells of metadata that it cannot read
            try:
                assert decode_rgb(bytes(broken), 16).mode == "RGB"
            except BadSample as error:
                reasons.append(str(error))
    assert 0 < len(reasons) < 80
    assert all(reasons)


def test_bombs_are_refused_by_their_header(monkeypatch):
    """Where Pillow refuses them too, unless another library told it not to."""
    assert MAX_PIXELS == 178_956_970
    jpeg = bytearray(encode(picture(), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 30_000, 30_000)  # it is small, and its header says otherwise
    for bomb in (bytes(jpeg), png(30_000, 30_000, 8, 6, b""), png(13_400, 13_400, 8, 2, b"")):
        assert reason(bomb).endswith("more than 178956970 pixels")
    warnings.simplefilter("error")  # Pillow warns from half of it on
    assert "truncated" in reason(png(13_377, 13_377, 1, 0, b""))  # just below the limit, and no rows
    content = encode(Image.new("L", (9500, 9500)), "PNG")
    assert packing.encode(content, None, 95) == ("png", content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason(bytes(jpeg)) == "30000x30000: more than 178956970 pixels"
