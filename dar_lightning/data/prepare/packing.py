"""Packing of one shard: read, check, resize and write its samples, unless it is there already."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dar_lightning.data.decode import BadSample, decode_rgb, open_image
from dar_lightning.data.prepare.sources import Sample
from dar_lightning.data.shards import Shard, write_shard
from dar_lightning.data.tar import read_headers
from dar_lightning.data.transforms import resize_short_side
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> extension in a shard


class Skipped(NamedTuple):
    """An image that was left out, and why."""

    shard: str
    key: str
    name: str
    reason: str


@dataclass(frozen=True)
class Packer:
    """Turns a sample of the source into the members of one in a shard."""

    read: Callable[[Any], tuple[bytes, dict[str, bytes]]]
    classes: tuple[str, ...]
    size: int | None
    quality: int

    def __call__(self, sample: Sample) -> dict[str, bytes]:
        """Contents by extension: the image, `cls`, `json` and what else the source has.

        Raises:
            BadSample: The image cannot be decoded, or the sample has no class.
        """
        if sample.flaw:
            raise BadSample(sample.flaw)
        content, others = self.read(sample.place)
        extension, content = encode(content, self.size, self.quality)
        about = {"name": sample.name} | ({"class": self.classes[sample.label]} if self.classes else {})
        return {"json": json.dumps(about).encode()} | others | {extension: content, "cls": str(sample.label).encode()}


def encode(content: bytes, size: int | None, quality: int) -> tuple[str, bytes]:
    """An image as it shall be stored: extension and content.

    It is decoded in any case, so that what lies in the shards is known to be whole.

    Args:
        content: The encoded image.
        size: Largest short side, or None.
        quality: Of the JPEG, if the image must be scaled.

    Raises:
        BadSample: It cannot be decoded.
    """
    image = decode_rgb(content)
    extension = KEPT_FORMATS.get(open_image(content).format)
    if size is not None and min(image.size) > size:
        encoded = io.BytesIO()
        resize_short_side(image, size).save(encoded, "JPEG", quality=quality, subsampling=0)
        return "jpg", encoded.getvalue()
    if extension is not None:
        return extension, content
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return "png", encoded.getvalue()


class Packed(NamedTuple):
    """A shard's index entry, what was left out of it, and whether an earlier run had made it."""

    entry: Shard
    skipped: list[Skipped]
    kept: bool


def make_shard(path: Path, samples: list[Sample], sha: str | None, pack: Packer) -> Packed:
    """Write one shard, unless it is there; `sha` is what an index of an earlier run says of it, if there is one.

    Raises:
        UserError: It cannot be written.
    """
    try:
        kept = _kept(path, samples, sha, pack)
        if kept is not None:
            return kept
        skipped: list[Skipped] = []
        return Packed(write_shard(path, _packed(path, samples, pack, skipped)), skipped, False)
    except OSError as error:
        raise UserError(f"output: cannot write {path} ({error.strerror})") from error


def _packed(
    path: Path, samples: list[Sample], pack: Packer, skipped: list[Skipped]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for sample in samples:
        try:
            members = pack(sample)
        except BadSample as error:
            skipped.append(Skipped(path.name, sample.key, sample.name, str(error)))
        else:
            yield sample.key, members


def _kept(path: Path, samples: list[Sample], sha: str | None, pack: Packer) -> Packed | None:
    """A shard that is there as planned; None if it must be made."""
    if not path.is_file() or not _is_whole(path):
        return None
    contents = read_headers(path)
    if contents.damage or any(sample.flaw for sample in contents.samples):
        return None
    found = [sample.key for sample in contents.samples]
    present = set(found)
    if found != [sample.key for sample in samples if sample.key in present]:
        return None
    skipped: list[Skipped] = []
    missing = [sample for sample in samples if sample.key not in present]
    if any(_packed(path, missing, pack, skipped)):  # it could be read now
        return None
    entry = Shard(path.name, len(found), path.stat().st_size, file_sha256(path))
    return Packed(entry, skipped, True) if sha in (None, entry.sha256) else None


def _is_whole(path: Path) -> bool:
    """Whether a tar ends with the zeros that its writer pads it with; without a SHA-256 nothing else tells."""
    end, size = 2 * tarfile.BLOCKSIZE, path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - end))
        return size % tarfile.RECORDSIZE == 0 and file.read() == bytes(end)
