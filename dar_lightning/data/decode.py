"""Encoded image -> RGB pixels, whatever the bytes are."""

import io

from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # beyond it Pillow refuses to open an image: 0.5 GB of RGB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # Pillow opens the MPO of phones as JPEG


class BadSample(Exception):
    """A sample that cannot be used; the message is the reason, in a few words."""


def decode_rgb(content: bytes) -> Image.Image:
    """The RGB image of an encoded file, as it is stored: orientation tags are ignored, transparency is dropped.

    Of an animation, the first frame; the format is told by the content, not by a name.

    Raises:
        BadSample: it is no image of FORMATS, is damaged, or has more than MAX_PIXELS, which its header tells.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadSample("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"more than {MAX_PIXELS} pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged bytes
        raise BadSample(_damage(error)) from error
    try:
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample(_damage(error)) from error


def _damage(error: Exception) -> str:
    return f"damaged ({' '.join(str(error).split()) or type(error).__name__})"
