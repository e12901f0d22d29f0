"""Decoding of image bytes to RGB pixels."""

import io
import warnings
from functools import cache

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Pillow's names of what it reads by itself and knows by its first bytes. EPS starts Ghostscript: never.
# The MPO of phones is opened as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "PSD", "QOI", "SGI")
MAX_PIXELS = 178_956_970  # as in Pillow: 0.5 GB of RGB
TURNS = {  # by the value of EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason, in a few words. Loaders skip, count and name it."""


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """File name extensions of these formats: `.jpg`, `.jfif`, `.avif`, ..., in lower case."""
    known = {*formats(), "MPO"}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def decode_rgb(content: bytes, draft_size: int | None = None) -> Image.Image:
    """The RGB image of an encoded file, as people see it: upright by its EXIF orientation, transparency on white.

    Of an animation, the first frame; of 16 bits, the upper 8. The format is told by the content, not by a name.

    Args:
        content: The file.
        draft_size: For training only. A JPEG with a short side of at least twice this is decoded at 1/2, 1/4 or 1/8 of
            its size, never to less than this: much faster than to scale it down afterwards, and not quite the same
            pixels.

    Raises:
        BadSample: It is no image of FORMATS, is damaged, or has more than MAX_PIXELS, which its header tells.
    """
    try:
        image = open_image(content)
        if image.width * image.height > MAX_PIXELS:
            raise BadSample(f"{image.width}x{image.height}: more than {MAX_PIXELS} pixels")
        if draft_size is not None:
            image.draft(None, (draft_size, draft_size))
        image.load()
        turn = _turn(image)
        is_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
        if is_16_bits:  # convert() would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise BadSample("pixels of 32 bits")  # nobody knows which value is white
        if image.has_transparency_data:
            image = _on_white(image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        return image if turn is None else image.transpose(turn)
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's readers raise many kinds on damaged bytes
        raise BadSample(f"damaged ({' '.join(str(error).split()) or type(error).__name__})") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Pillow's transpose for an image's EXIF orientation; None if it is upright, or its EXIF cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        except MemoryError:
            raise
        except Exception:  # damaged metadata do not make a damaged image
            return None


def _on_white(image: Image.Image) -> Image.Image:
    try:
        image = image.convert("RGBA")  # of a palette or one transparent colour, too
    except (ValueError, TypeError, OverflowError):  # a colour that is none of the image's
        image.info.pop("transparency", None)
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def open_image(content: bytes) -> Image.Image:
    """What the header of an encoded file says: format, size, mode. Raises many kinds if it is none of FORMATS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half of MAX_PIXELS on
        return Image.open(io.BytesIO(content), formats=formats())
