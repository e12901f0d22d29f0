"""Shards on disk: a folder of WebDataset tars and the `index.json` that says what they hold.

A shard is an uncompressed tar; the members of one sample share a key (`KEY.jpg`, `KEY.cls`, `KEY.json`), as in
webdataset, whose TarWriter writes it. Being uncompressed, any sample can be read by its offset (`shard_reader.py`), so
the order of training is free: it is decided in `sampler.py`, not by the order of the files.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from webdataset import TarWriter
from webdataset.shardlists import expand_urls

from dar_lightning.data.bad_samples import Bad
from dar_lightning.data.decode import BadSample
from dar_lightning.data.remote import PATIENCE, cache_folder, fetch, forget_differing
from dar_lightning.data.tar import read_headers
from dar_lightning.errors import UserError, require
from dar_lightning.files import atomic_path, file_sha256, find_shipped, is_url, write_json

INDEX = "index.json"
VERSION = 1
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """One file: its name in the folder, number of samples, size in bytes, and SHA-256 (None where not computed)."""

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
    """The shards of one split."""

    root: Path  # the folder that they lie in, or are copied to at first touch
    shards: tuple[Shard, ...]  # damaged ones, too: samples keep their numbers, and those that are lost cannot be read
    classes: tuple[str, ...] = ()  # names of the classes that the labels count; empty when unknown
    url: str | None = None  # the folder that they are copied from
    labelled: bool = True  # False: no sample has a `.cls` member
    patience: float = field(default=PATIENCE, compare=False)  # seconds for which a server may be away
    lost: tuple[Bad, ...] = field(default=(), compare=False, repr=False)  # what is known before anything is read

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
            **({} if self.labelled else {"labelled": False}),
            "shards": [asdict(shard) for shard in self.shards],
            # the same for `wids` of the WebDataset project, which reads samples by their number, too
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "shardlist": [
                {"url": shard.name, "nsamples": shard.samples, "filesize": shard.bytes} for shard in self.shards
            ],
        }
        write_json(self.root / INDEX, content, indent=1)

    @classmethod
    def load(
        cls, source: str | Path, option: str = "shards", cache_dir: str | None = None, patience: float = PATIENCE
    ) -> "ShardIndex":
        """Find the shards that a user named: `source` is the value of `option`.

        It is a folder (with `index.json`, or else its `*.tar` files are counted), one tar, or a brace pattern such as
        `shards/{000000..000099}.tar`; or a URL of any of these, for a folder one with an index. Files that are missing,
        cut or empty are no error here, as long as there are others; see `lost`.

        Raises:
            UserError: There is nothing that can be read, or a shard is named that is neither there nor in the index.
        """
        source = str(source)
        if source.startswith(("http://", "https://")) and "?" in source:  # it may be a secret: not in the line
            raise UserError(f"{option}: {source.partition('?')[0]}?... has a query; give an address without")
        folder, names = source, None
        if source.endswith(".tar") and not Path(source).is_dir():
            folders, names = zip(*map(os.path.split, expand_urls(source)), strict=True)
            folder = folders[0]
            require(len({*folders}) <= 1, f"{option}: the shards of {source} must lie in one folder")
        url = folder.rstrip("/") if is_url(folder) else None
        root = Path(find_shipped(folder)) if url is None else _fetch_index(url, names is None, cache_dir, option)
        require(root.is_dir(), f"{option}: {source} does not exist; give a folder of .tar shards or a pattern of them")
        known, classes, labelled = {}, (), None
        if (root / INDEX).is_file():
            content, shards = read_index(root, option, ("classes",))
            known, classes = {shard.name: shard for shard in shards}, tuple(content["classes"])
            labelled = content.get("labelled", True) is True
            if any(not name.endswith(".tar") for name in known):
                raise UserError(f"{option}: {root} holds token shards, images are needed")
        names = names or list(known) or sorted(path.name for path in root.glob("*.tar"))
        if url is None and (missing := [name for name in names if name not in known and not (root / name).exists()]):
            raise UserError(f"{option}: {root / missing[0]} is missing, {len(missing)} of {len(names)} are")
        examined = [_examine(root, url, name, known.get(name)) for name in names]
        lost = tuple(one for _, bad, _ in examined for one in bad)
        labelled = any(found for *_, found in examined) if labelled is None else labelled
        index = cls(root, tuple(entry for entry, *_ in examined), classes, url, labelled, patience, lost)
        require(index.num_samples > 0, f"{option}: no samples in {source}; give a folder of .tar shards")
        if len(lost) >= index.num_samples:
            raise UserError(f"{option}: nothing in {source} can be read; {lost[0]}")
        return index

    def path(self, shard: Shard) -> Path:
        """Where a shard lies; a remote one is copied first.

        Raises:
            BadSample: the server has no such shard.
            MachineFault: the server did not give it for as long as `patience`.
        """
        path = self.root / shard.name
        if self.url is not None:
            try:
                fetch(f"{self.url}/{shard.name}", path, shard.bytes, shard.sha256, patience=self.patience)
            except FileNotFoundError as error:
                raise BadSample("the file is missing on the server") from error
        return path


def _fetch_index(url: str, needed: bool, cache_dir: str | None, option: str) -> Path:
    """The folder of a remote folder's copies, with its index in it if there is one."""
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


def _examine(root: Path, url: str | None, name: str, entry: Shard | None) -> tuple[Shard, list[Bad], bool]:
    """A shard's entry, made if there is none, what is known to be lost of it, and whether samples that were looked at
    have labels. Remote ones are trusted.
    """
    path = root / name
    if entry is not None and (url is not None or (path.is_file() and path.stat().st_size == entry.bytes)):
        return entry, [], False
    if url is not None:
        try:
            fetch(f"{url}/{name}", path)
        except FileNotFoundError as error:
            raise UserError(f"{url}/{name} is missing, and no {INDEX} says what it should hold") from error
    contents = read_headers(path)
    found = len(contents.samples)
    if entry is None:  # of what has no end, who knows how much is missing: one sample at least
        entry = Shard(name, found + bool(contents.damage), path.stat().st_size)
    flaws = ((position, contents.flaw(position)) for position in range(max(found, entry.samples)))
    bad = [Bad(f"{name}/{contents.name(position)}", flaw) for position, flaw in flaws if flaw]
    return entry, bad, any("cls" in sample.members for sample in contents.samples)


def read_index(folder: Path, option: str, needed: tuple[str, ...]) -> tuple[dict, tuple[Shard, ...]]:
    """A folder's `index.json` and the shards in it; a UserError if it is none, or has not the `needed` names."""
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
        shards, version = tuple(Shard(**shard) for shard in content["shards"]), content["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:  # or webdataset's, which is another
        raise UserError(f"{option}: {path} is not a shard index ({error!r}); rename or rebuild it") from error
    require(version == VERSION, f"{option}: {path} has version {version!r}, this program reads version {VERSION}")
    if missing := sorted({*needed} - content.keys()):
        raise UserError(f"{option}: {path} is another kind of index, it has no {', '.join(missing)}")
    return content, shards


def data_sha256(shards: Iterable[Shard], *more: object) -> str:
    """The first 16 digits of a SHA-256 over the shards' names, counts and SHA-256, and over other things in JSON."""
    content = [(shard.name, shard.samples, shard.sha256) for shard in shards]
    return hashlib.sha256(json.dumps([content, *more]).encode()).hexdigest()[:16]


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Shard:
    """Write samples, (key, {extension: content}), as one tar, atomically: the same bytes on any machine."""
    keys = set()
    same = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "keep_meta": True}  # whoever writes it, and when
    with atomic_path(path) as part, part.open("wb") as file, TarWriter(file, encoder=False, **same) as tar:
        for key, members in samples:
            if key in keys:
                raise UserError(f"{path}: two samples have the key {key}, keys must be unique in a shard")
            keys.add(key)
            tar.write({"__key__": key} | members)
    return Shard(path.name, len(keys), path.stat().st_size, file_sha256(path))
