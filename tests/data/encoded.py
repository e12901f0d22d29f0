"""Image files, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


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
