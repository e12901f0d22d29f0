"""WebDataset shards on disk: a folder of tar files and the `index.json` that says exactly what they hold.

A shard is an uncompressed tar; the members of one sample share a key (`KEY.jpg`, `KEY.cls`, `KEY.json`), as in
webdataset. Being uncompressed, any sample can be read by its offset, so the order of training is free: it is decided
in `stream.py`, not by the order of the files.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, write_text

INDEX = "index.json"
VERSION = 1
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, number of samples, size in bytes, and SHA-256 (None where not computed)."""

    name: str
    samples: int
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one split, and the names of the classes that their labels count (empty when unknown)."""

    root: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def save(self) -> None:
        """Write `index.json` into the folder, atomically."""
        content = {
            "version": VERSION,
            "samples": self.num_samples,
            "bytes": sum(shard.bytes for shard in self.shards),
            "classes": list(self.classes),
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_text(self.root / INDEX, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, source: str | Path, option: str = "shards") -> "ShardIndex":
        """Find the shards that a user named.

        Args:
            source: A folder (with `index.json`, or else its `*.tar` files are counted), one tar, or a brace pattern
                such as `shards/{000000..000099}.tar`.
            option: What the user calls this value, for the error line.

        Returns:
            The index; the size of every file has been compared with it.

        Raises:
            UserError: Nothing there, nothing in it, a shard missing or of another size than its index says.
        """
        source = str(source)
        folder = Path(source)
        if folder.is_dir():
            if (folder / INDEX).is_file():
                index = cls._read(folder, option)
            else:
                names = sorted(path.name for path in folder.glob("*.tar"))
                index = cls(folder, tuple(_measure(folder / name) for name in names))
        elif source.endswith(".tar"):
            paths = [Path(url) for url in expand_urls(source)]
            folder = paths[0].parent
            if missing := [path for path in paths if not path.is_file()]:
                raise UserError(f"{option}: {missing[0]} is missing ({len(missing)} of {len(paths)} named by {source})")
            if any(path.parent != folder for path in paths):
                raise UserError(f"{option}: the shards of {source} must lie in one folder")
            known = cls._read(folder, option) if (folder / INDEX).is_file() else cls(folder, ())
            by_name = {shard.name: shard for shard in known.shards}
            shards = tuple(by_name.get(path.name) or _measure(path) for path in paths)
            index = cls(folder, shards, known.classes)
        else:
            raise UserError(f"{option}: {source} does not exist; give a folder of .tar shards or a pattern of them")
        if index.num_samples == 0:
            raise UserError(
                f"{option}: no samples in {source}; give a folder of .tar shards, as webdataset writes them"
            )
        check_files(folder, index.shards, option)
        return index

    @classmethod
    def _read(cls, folder: Path, option: str) -> "ShardIndex":
        content, shards = read_index(folder, option, ("classes",))
        if any(not shard.name.endswith(".tar") for shard in shards):
            raise UserError(f"{option}: {folder} holds token shards, images are needed")
        return cls(folder, shards, tuple(content["classes"]))


def read_index(folder: Path, option: str, needed: tuple[str, ...]) -> tuple[dict, tuple[Shard, ...]]:
    """Read a folder's `index.json`.

    Args:
        folder: Where it lies.
        option: What the user calls the folder, for the error line.
        needed: Names that must be in it, besides the version and the shards.

    Returns:
        Its content, and its shards.

    Raises:
        UserError: It cannot be read, is something else, or was written by a later version.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
        shards = tuple(Shard(**shard) for shard in content["shards"])
        version = content["version"]
        missing = [name for name in needed if name not in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{option}: {path} is not a shard index ({error!r}); delete it or rebuild it") from error
    if version != VERSION:
        raise UserError(f"{option}: {path} has version {version!r}, this program reads version {VERSION}")
    if missing:
        raise UserError(f"{option}: {path} is another kind of index, it has no {', '.join(missing)}")
    return content, shards


def check_files(folder: Path, shards: Iterable[Shard], option: str) -> None:
    """Compare the files of a folder with its index, by their sizes.

    Raises:
        UserError: One is missing or has another size.
    """
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"{option}: {path} is missing, although {folder / INDEX} names it")
        if path.stat().st_size != shard.bytes:
            size = path.stat().st_size
            raise UserError(f"{option}: {path} has {size} bytes, {INDEX} says {shard.bytes}; copy it again")


class ShardReader:
    """Random access to the samples of a `ShardIndex`, by their number in the order of the shards.

    Offsets are read from a shard's tar headers when it is first touched, and the last few shards stay open. Copies
    in worker processes open their own files.
    """

    def __init__(self, index: ShardIndex, max_open: int = 64) -> None:
        self.index = index
        self.ends = np.cumsum([shard.samples for shard in index.shards])  # (shards,)
        self.max_open = max_open
        self._open: OrderedDict[int, tuple[BinaryIO, list[_Sample]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def __getitem__(self, number: int) -> tuple[str, str, dict[str, bytes]]:
        """Shard name, key, and the sample's members by lower-case extension."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = int(np.searchsorted(self.ends, number, side="right"))
        shard = self.index.shards[which]
        file, samples = self._shard(which)
        key, members = samples[number - int(self.ends[which]) + shard.samples]
        # pread keeps no file position: safe where a fork shares the descriptor
        return shard.name, key, {ext: os.pread(file.fileno(), size, at) for ext, (at, size) in members.items()}

    def _shard(self, which: int) -> "tuple[BinaryIO, list[_Sample]]":
        if which not in self._open:
            shard = self.index.shards[which]
            path = self.index.root / shard.name
            samples = scan(path)
            if len(samples) != shard.samples:
                raise UserError(f"{path} holds {len(samples)} samples, its {INDEX} says {shard.samples}; rebuild it")
            if len(self._open) >= self.max_open:
                self._open.popitem(last=False)[1][0].close()
            self._open[which] = path.open("rb", buffering=0), samples
        self._open.move_to_end(which)
        return self._open[which]


_Sample = tuple[str, dict[str, tuple[int, int]]]  # key, {extension: (offset, size)}


def scan(path: Path) -> list[_Sample]:
    """List the samples of a tar by its headers alone: (key, {extension: (offset, size)}), in order of appearance."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if member.isreg() and key is not None:
                    samples.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable uncompressed tar file ({error})") from error
    return list(samples.items())


def image_member(members: dict[str, bytes], shard: str, key: str) -> bytes:
    """The encoded image among a sample's members."""
    for extension in IMAGE_TYPES:
        if extension in members:
            return members[extension]
    raise UserError(f"{shard}: {key} has no image ({', '.join(IMAGE_TYPES)}), only {', '.join(sorted(members))}")


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Shard:
    """Write samples as one tar, atomically; the same samples give the same bytes on any machine.

    Args:
        path: The tar to make.
        samples: (key, {extension: content}), in the order in which they shall lie in the file.

    Returns:
        The index entry of the new shard.
    """
    count = 0
    with atomic_path(path) as part, tarfile.open(part, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            count += 1
            for extension, content in sorted(members.items()):
                header = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: time, owner and group 0, mode 0644
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return Shard(path.name, count, path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _measure(path: Path) -> Shard:
    """The index entry of a tar that no index describes."""
    return Shard(path.name, len(scan(path)), path.stat().st_size)
