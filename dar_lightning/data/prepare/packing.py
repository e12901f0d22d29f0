"""Packing of one shard: read, check, resize and write its samples, unless it is there already."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dar_lightning.data.decode import BadSample, decode_rgb, open_image
from dar_lightning.data.prepare.sources import Sample
from dar_lightning.data.shards import Shard, write_shard
from dar_lightning.data.tar import read_headers
from dar_lightning.data.transforms import resize_short_side
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> extension in a shard


@dataclass(frozen=True)
class Packer(Dataset):
    """Makes shards of a source's samples, in whichever process asks: `packer[path, samples, sha256]` is one.

    That is its index entry, and what was left out of it: "shard", "key", "name" and "reason". A shard of these samples
    that is there already is kept, if it has the SHA-256 that the index of an earlier run names, or none does.
    """

    read: Callable[[Any], tuple[bytes, dict[str, bytes]]]
    classes: tuple[str, ...]
    size: int | None
    quality: int

    def __getitem__(self, job: tuple[Path, list[Sample], str | None]) -> tuple[Shard, list[dict[str, str]]]:
        path, samples, sha256 = job
        skipped: list[dict[str, str]] = []
        try:
            if (entry := self._kept(path, samples, skipped)) and sha256 in (None, entry.sha256):
                return entry, skipped
            skipped.clear()
            return write_shard(path, self._pack(path, samples, skipped)), skipped
        except OSError as error:
            raise UserError(f"output: cannot write {path} ({error.strerror})") from error

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

    def _kept(self, path: Path, samples: list[Sample], skipped: list) -> Shard | None:
        """The entry of a shard that is there as planned; None if it must be made."""
        contents = read_headers(path)
        if contents.damage or any(sample.flaw for sample in contents.samples):
            return None
        found = [sample.key for sample in contents.samples]
        present = set(found)
        missing = [sample for sample in samples if sample.key not in present]
        if found != [sample.key for sample in samples if sample.key in present]:
            return None
        if any(self._pack(path, missing, skipped)):  # it could be read now
            return None
        return Shard(path.name, len(found), path.stat().st_size, file_sha256(path))


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
