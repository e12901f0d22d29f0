"""SHA-256 of a set of images, by their pixels in order, in whatever format they are stored."""

import hashlib
from collections.abc import Iterable

import numpy as np


def image_digests(images: np.ndarray) -> list[bytes]:
    """SHA-256 of each image of uint8 (B, H, W, 3)."""
    return [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in images]


def set_sha256(digests: Iterable[bytes]) -> str:
    """SHA-256 over the digests of a set's images, in order: ranks can share the work, a writer needs no second pass.

    Of an npz: `sha256(b"".join(sha256(image).digest() for image in arr_0)).hexdigest()`.
    """
    return hashlib.sha256(b"".join(digests)).hexdigest()
