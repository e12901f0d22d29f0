"""Packing of one shard: read, check, resize and write its samples, unless it is there already."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from dar_lightning.data.decode import BadSample, decode_rgb, open_image
from dar_lightning.data.prepare.sources import Sample
from dar_lightning.data.shards import Shard, write_shard
from dar_lightning.data.tar import read_headers
from dar_lightning.data.transforms import resize_short_side
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> extension in a shard


class Job(NamedTuple):
    """A shard to make: where, of which samples, and its SHA-256 where the index of an earlier run has one."""

    path: Path
    samples: list[Sample]
    sha256: str | None


class Packed(NamedTuple):
    """A shard's index entry, and what was left out of it: its "shard", "key", "name" and "reason"."""

    entry: Shard
    skipped: list[dict[str, str]]


@dataclass(frozen=True)
class Packer(Dataset):
    """Makes shards of a source's samples: `packer[job]` is one, in whichever process asks for it."""

    read: Callable[[Any], tuple[bytes, dict[str, bytes]]]
    classes: tuple[str, ...]
    size: int | None
    quality: int

    def __getitem__(self, job: Job) -> Packed:
        try:
            if (kept := self._kept(job)) is not None:
                return kept
            skipped: list[dict[str, str]] = []
            return Packed(write_shard(job.path, self._pack(job.path, job.samples, skipped)), skipped)
        except OSError as error:
            raise UserError(f"output: cannot write {job.path} ({error.strerror})") from error

    def _pack(self, path: Path, samples: list[Sample], skipped: list) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys and members of the good samples; the others are added to `skipped`."""
        for sample in samples:
            try:
                if sample.flaw:
                    raise BadSample(sample.flaw)
                content, members = self.read(sample.place)
                extension, content = encode(content, self.size, self.quality)
            except BadSample as bad:
                skipped.append({"shard": path.name, "key": sample.key, "name": sample.name, "reason": str(bad)})
                continue
            about = {"name": sample.name} | ({"class": self.classes[sample.label]} if self.classes else {})
            image = {extension: content, "cls": str(sample.label).encode()}
            yield sample.key, {"json": json.dumps(about).encode()} | members | image

    def _kept(self, job: Job) -> Packed | None:
        """A shard that is there as planned; None if it must be made."""
        contents = read_headers(job.path)
        if contents.damage or any(sample.flaw for sample in contents.samples):
            return None
        found = [sample.key for sample in contents.samples]
        present, skipped = set(found), []
        missing = [sample for sample in job.samples if sample.key not in present]
        if found != [sample.key for sample in job.samples if sample.key in present]:
            return None
        if any(self._pack(job.path, missing, skipped)):  # it could be read now
            return None
        entry = Shard(job.path.name, len(found), job.path.stat().st_size, file_sha256(job.path))
        return Packed(entry, skipped) if job.sha256 in (None, entry.sha256) else None


def encode(content: bytes, size: int | None, quality: int) -> tuple[str, bytes]:
    """An image as it shall be stored, extension and content: scaled to a short side of at most `size`, as JPEG.

    It is decoded in any case, so that what lies in the shards is whole; BadSample if it cannot be.
    """
    image, encoded = decode_rgb(content), io.BytesIO()
    if size is not None and min(image.size) > size:
        resize_short_side(image, size).save(encoded, "JPEG", quality=quality, subsampling=0)
        return "jpg", encoded.getvalue()
    if extension := KEPT_FORMATS.get(open_image(content).format):
        return extension, content
    image.save(encoded, "PNG")
    return "png", encoded.getvalue()
