"""WebDataset shards on disk: a folder of tar files and the `index.json` that says exactly what they hold.

A shard is an uncompressed tar; the members of one sample share a key (`KEY.jpg`, `KEY.cls`, `KEY.json`), as in
webdataset. Being uncompressed, any sample can be read by its offset, so the order of training is free: it is decided
in `loader.py`, not by the order of the files.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from webdataset.shardlists import expand_urls

from dar_lightning.data.bad_samples import Bad
from dar_lightning.data.decode import BadSample
from dar_lightning.data.remote import cache_folder, fetch, forget_differing, is_remote
from dar_lightning.data.tar import Contents, Sample, read_headers
from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, find_shipped, write_text

INDEX = "index.json"
VERSION = 1
log = logging.getLogger(__name__)

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the folder, number of samples, size in bytes, and SHA-256 (None where not computed)."""

    name: str
    samples: int
    bytes: int
    sha256: str | None = None

    def __post_init__(self) -> None:
        # an index is read from a file, from a server perhaps: its names must not lead out of its folder
        if self.name != Path(self.name).name or type(self.samples) is not int or self.samples < 0:
            raise ValueError(f"{self.name!r} with {self.samples!r} samples is not a shard")


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one split.

    Args:
        root: The folder that they lie in, or are copied to at first touch.
        shards: The files. They may be damaged: samples keep their numbers, and those that are lost cannot be read.
        classes: Names of the classes that the labels count; empty when unknown.
        url: The folder that they are copied from.
        lost: What is known to be wrong before anything is read: bad samples.
    """

    root: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    url: str | None = None
    lost: tuple[Bad, ...] = field(default=(), compare=False, repr=False)

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
    def load(cls, source: str | Path, option: str = "shards", cache_dir: str | None = None) -> "ShardIndex":
        """Find the shards that a user named.

        Files that are missing, cut or empty are no error here, as long as there are others; see `lost`.

        Args:
            source: A folder (with `index.json`, or else its `*.tar` files are counted), one tar, or a brace pattern
                such as `shards/{000000..000099}.tar`; or a URL of any of these, for a folder one with an index.
            option: What the user calls this value, for the error line.
            cache_dir: Folder for copies of remote shards.

        Raises:
            UserError: Nothing there, nothing in it, nothing that can be read, or a shard is named that is neither
                there nor in the index.
        """
        source = str(source)
        if source.startswith(("http://", "https://")) and "?" in source:  # it may be a secret: not in the line
            raise UserError(
                f"{option}: {source.partition('?')[0]}?... has a query, as signed addresses do; give an address without"
            )
        folder, names = source, None
        if source.endswith(".tar") and not Path(source).is_dir():
            paths = [os.path.split(path) for path in expand_urls(source)]
            folder, names = paths[0][0], [name for _, name in paths]
            if any(parent != folder for parent, _ in paths):
                raise UserError(f"{option}: the shards of {source} must lie in one folder")
        url = folder.rstrip("/") if is_remote(folder) else None
        root = Path(find_shipped(folder)) if url is None else cls._fetch_index(url, names is None, cache_dir, option)
        if not root.is_dir():
            raise UserError(f"{option}: {source} does not exist; give a folder of .tar shards or a pattern of them")
        known = cls._read(root, option) if (root / INDEX).is_file() else None
        by_name = {shard.name: shard for shard in known.shards} if known else {}
        if names is None:
            names = list(by_name) if known else sorted(path.name for path in root.glob("*.tar"))
        if url is None and (missing := [name for name in names if name not in by_name and not (root / name).exists()]):
            raise UserError(
                f"{option}: {root / missing[0]} is missing ({len(missing)} of {len(names)} named by {source})"
            )
        examined = [_examine(root, url, name, by_name.get(name)) for name in names]
        lost = tuple(one for _, bad in examined for one in bad)
        index = cls(root, tuple(entry for entry, _ in examined), known.classes if known else (), url, lost)
        if index.num_samples == 0:
            raise UserError(
                f"{option}: no samples in {source}; give a folder of .tar shards, as webdataset writes them"
            )
        if len(lost) >= index.num_samples:
            raise UserError(f"{option}: nothing in {source} can be read; {lost[0]}")
        return index

    def path(self, shard: Shard) -> Path:
        """Where a shard lies; a remote one is copied first.

        Raises:
            BadSample: The server has no such shard.
            UserError: The server does not answer.
        """
        path = self.root / shard.name
        if self.url is not None:
            try:
                fetch(f"{self.url}/{shard.name}", path, shard.bytes, shard.sha256)
            except FileNotFoundError as error:
                raise BadSample("the file is missing on the server") from error
        return path

    @staticmethod
    def _fetch_index(url: str, needed: bool, cache_dir: str | None, option: str) -> Path:
        root = cache_folder(url, cache_dir, option)
        try:
            forget_differing(root)
            fetch(f"{url}/{INDEX}", root / INDEX, renew=True)
        except FileNotFoundError as error:
            (root / INDEX).unlink(missing_ok=True)
            if needed:
                raise UserError(f"{option}: {url} has no {INDEX}; give a pattern of .tar files instead") from error
        except UserError as error:
            if not (root / INDEX).is_file():
                raise
            log.warning("%s: %s; going on with the copy of before", option, error)
        return root

    @classmethod
    def _read(cls, folder: Path, option: str) -> "ShardIndex":
        content, shards = read_index(folder, option, ("classes",))
        if any(not shard.name.endswith(".tar") for shard in shards):
            raise UserError(f"{option}: {folder} holds token shards, images are needed")
        if not isinstance(content["classes"], list) or not all(isinstance(name, str) for name in content["classes"]):
            raise UserError(f"{option}: classes in {folder / INDEX} are no list of names; rebuild it")
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
        if "shardlist" in content:
            raise UserError(
                f"{option}: {path} is webdataset's (widsindex), another format; rename it, and the shards are counted, "
                "or pack them anew with dar shard"
            )
        shards = tuple(Shard(**shard) for shard in content["shards"])
        version = content["version"]
        missing = [name for name in needed if name not in content]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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


def _examine(root: Path, url: str | None, name: str, entry: Shard | None) -> tuple[Shard, list[Bad]]:
    """A shard's entry, made if there is none, and what is known to be lost of it. Remote ones are trusted."""
    path = root / name
    if entry is None and url is not None:
        try:
            fetch(f"{url}/{name}", path)
        except FileNotFoundError as error:
            raise UserError(f"{url}/{name} is missing, and no {INDEX} says what it should hold") from error
    elif entry is not None and (url is not None or (path.is_file() and path.stat().st_size == entry.bytes)):
        return entry, []
    contents = _headers(path)
    found = len(contents.samples)
    if entry is None:  # of what has no end, who knows how much is missing: one sample at least
        entry = Shard(name, found + bool(contents.damage), path.stat().st_size)
    flaws = ((position, contents.flaw(position)) for position in range(max(found, entry.samples)))
    return entry, [Bad(f"{name}/{contents.name(position)}", flaw) for position, flaw in flaws if flaw]


def fingerprint(shards: Iterable[Shard], *more: object) -> str:
    """A short hash of what shards hold, by their names, counts and SHA-256; and of other things in JSON."""
    content = [(shard.name, shard.samples, shard.sha256) for shard in shards]
    return hashlib.sha256(json.dumps([content, *more]).encode()).hexdigest()[:16]


class ShardReader:
    """Random access to the samples of a `ShardIndex`, by their number in the order of the shards.

    Offsets are read from a shard's tar headers when it is first touched, and the last few shards stay open. Copies
    in worker processes open their own files.
    """

    def __init__(self, index: ShardIndex, max_open: int = 64) -> None:
        self.index = index
        self.ends = np.cumsum([shard.samples for shard in index.shards])  # (shards,)
        self.max_open = max_open
        self._open: OrderedDict[int, tuple[BinaryIO | None, Contents]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def __getitem__(self, number: int) -> tuple[str, str, dict[str, bytes]]:
        """Shard name, key, and the contents of the sample's members by lower-case extension.

        Raises:
            BadSample: It is lost, or cannot be read.
        """
        return self.read(number)

    def read(self, number: int, only: Collection[str] | None = None) -> tuple[str, str, dict[str, bytes]]:
        """The same, with only some of the members."""
        which, position = self._locate(number)
        file, contents = self._shard(which)
        if flaw := contents.flaw(position):
            raise BadSample(flaw)
        key, places, _ = contents.samples[position]
        try:
            # pread keeps no file position: safe where threads, or forks, share the descriptor
            members = {
                extension: os.pread(file.fileno(), size, offset)
                for extension, (offset, size) in places.items()
                if only is None or extension in only
            }
        except OSError as error:
            raise BadSample(f"it cannot be read ({error.strerror})") from error
        return self.index.shards[which].name, key, members

    def name(self, number: int) -> str:
        """What a log calls a sample, good or bad: "shard/key"."""
        which, position = self._locate(number)
        return f"{self.index.shards[which].name}/{self._shard(which)[1].name(position)}"

    def _locate(self, number: int) -> tuple[int, int]:
        """Number of a sample's shard, and its number in there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = int(np.searchsorted(self.ends, number, side="right"))
        return which, number - int(self.ends[which]) + self.index.shards[which].samples

    def _shard(self, which: int) -> tuple[BinaryIO | None, Contents]:
        if which not in self._open:
            self._open[which] = self._read_shard(self.index.shards[which])
            if len(self._open) > self.max_open and (oldest := self._open.popitem(last=False)[1][0]):
                oldest.close()
        self._open.move_to_end(which)
        return self._open[which]

    def _read_shard(self, shard: Shard) -> tuple[BinaryIO | None, Contents]:
        try:
            path = self.index.path(shard)
        except BadSample as bad:
            return None, Contents([], str(bad))
        contents = _headers(path)
        if any(not sample.flaw for sample in contents.samples[shard.samples :]):
            if shard.sha256 in (None, sha256(path)):
                raise UserError(
                    f"{path} holds {len(contents.samples)} samples, its {INDEX} says {shard.samples}; rebuild it"
                )
            # a damaged name has made two samples of one: these go last, the good ones keep a number
            contents.samples.sort(key=lambda sample: bool(sample.flaw) or not _is_complete(sample))
        return path.open("rb", buffering=0) if contents.samples else None, contents


def _headers(path: Path) -> Contents:
    """Like `read_headers`. What may be otherwise in a moment must not count as damage: samples would be lost."""
    try:
        return read_headers(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _is_complete(sample: Sample) -> bool:
    return "cls" in sample.members and any(extension in sample.members for extension in IMAGE_TYPES)


def image_member(members: dict[str, bytes]) -> bytes:
    """The encoded image among a sample's members.

    Raises:
        BadSample: There is none.
    """
    for extension in IMAGE_TYPES:
        if extension in members:
            return members[extension]
    raise BadSample(f"no image ({', '.join(IMAGE_TYPES)})")


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Shard:
    """Write samples as one tar, atomically; the same samples give the same bytes on any machine.

    Args:
        path: The tar to make.
        samples: (key, {extension: content}), in the order in which they shall lie in the file.

    Returns:
        The index entry of the new shard.
    """
    keys = set()
    with atomic_path(path) as part, tarfile.open(part, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            if key in keys:
                raise UserError(f"{path}: two samples have the key {key}, keys must be unique in a shard")
            keys.add(key)
            for extension, content in sorted(members.items()):
                header = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: time, owner and group 0, mode 0644
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return Shard(path.name, len(keys), path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
