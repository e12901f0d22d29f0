"""Decoding of image bytes to RGB pixels."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow's names; the MPO of phones is opened as JPEG
MAX_PIXELS = 178_956_970  # as in Pillow: 0.5 GB of RGB


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason, in a few words. Loaders skip, count and name it."""


def decode_rgb(content: bytes, draft_size: int | None = None) -> Image.Image:
    """The RGB image of an encoded file, as it is stored: orientation tags are ignored, transparency is dropped.

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
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # convert() would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise BadSample("pixels of 32 bits")  # nobody knows which value is white
        image.info.pop("transparency", None)  # not wanted, and convert() warns of a palette's
        return image if image.mode == "RGB" else image.convert("RGB")
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's readers raise many kinds on damaged bytes
        raise BadSample(f"damaged ({' '.join(str(error).split()) or type(error).__name__})") from error


def open_image(content: bytes) -> Image.Image:
    """What the header of an encoded file says: format, size, mode. Raises many kinds if it is none of FORMATS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half of MAX_PIXELS on
        return Image.open(io.BytesIO(content), formats=FORMATS)
