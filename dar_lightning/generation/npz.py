"""Writing ADM's sample npz piece by piece: one array of images that may be larger than memory."""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dar_lightning.files import atomic_path
from dar_lightning.records.pixels import image_digests, set_sha256

UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)  # what a damaged npz raises


def write_npz(
    path: str | Path, pieces: Iterable[np.ndarray], shape: tuple[int, int, int, int], labels: np.ndarray | None = None
) -> str:
    """Write `arr_0`, and `labels` (n,) where there are some, atomically; equal content gives equal bytes.

    Args:
        path: the .npz file.
        pieces: uint8 (m, H, W, 3) each, which together are the array; one at a time is in memory.
        shape: (n, H, W, 3) of it all; a ValueError if the pieces do not add up to it.
        labels: integers.

    Returns:
        The images' SHA-256, see `records.pixels.set_sha256`.
    """
    digests = []
    # not compressed, as np.savez writes and ADM's evaluator reads it; a ZipInfo of its own has a fixed date
    with atomic_path(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for piece in pieces:
                if piece.dtype != np.uint8 or piece.shape[1:] != shape[1:]:
                    raise ValueError(f"a piece is {piece.dtype} {piece.shape}: need uint8 (m, {shape[1:]})")
                member.write(np.ascontiguousarray(piece).data)
                digests += image_digests(piece)
        if len(digests) != shape[0]:
            raise ValueError(f"the pieces hold {len(digests)} images: need {shape[0]}")
        if labels is not None:
            with archive.open(zipfile.ZipInfo("labels.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int64))
    return set_sha256(digests)
