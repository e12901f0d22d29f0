"""Shards on a server: each is copied whole, once, into a folder on this machine, and is a local file from then on."""

import hashlib
import logging
import time
from collections.abc import Collection
from pathlib import Path

import fsspec
from aiohttp import ClientTimeout
from filelock import FileLock

from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, write_text

TRIES = 4
WAIT = 0.5  # seconds before the second try; doubled after each
PATIENCE = ClientTimeout(total=None, sock_connect=20, sock_read=60)  # however large a shard is, silence ends


log = logging.getLogger(__name__)


def is_remote(source: str) -> bool:
    """Whether it is a URL (`https://...`, `s3://...`), and no path."""
    return "://" in source


def cache_folder(url: str, cache_dir: str | None, option: str) -> Path:
    """Where the files of a remote folder are kept.

    Raises:
        UserError: No place is given.
    """
    if cache_dir is None:
        raise UserError(f"{option}: {url} is remote, set cache_dir to a folder that its shards are copied to")
    return Path(cache_dir) / hashlib.sha256(url.encode()).hexdigest()[:16]


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None, renew: bool = False) -> None:
    """Copy a file from a server, unless it is here; of several processes that want it, one does it.

    A copy that is not what it must be is fetched again, and kept if it is the same the second time: most of a shard may
    be good. `PATH.differs` then says what is wrong, and nothing is fetched again until `forget_differing`.

    Args:
        url: Of any kind that fsspec knows.
        path: The copy.
        size: Bytes that it must have, where known.
        sha256: What its content must hash to, where known.
        renew: Copy it even if it is here.

    Raises:
        FileNotFoundError: The server has no such file.
        UserError: The server does not answer, or the copy cannot be written.
    """
    if _is_here(path, size) and not renew:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise UserError(f"cache_dir: {path.parent} cannot be written ({error.strerror})") from error
    with lock:
        if _is_here(path, size) and not renew:
            return
        seen: list[str] = []  # what was wrong with earlier copies
        for attempt in range(TRIES):
            try:
                return _copy(url, path, size, sha256, seen)
            except (FileNotFoundError, UserError):
                raise
            except Differs as error:
                problem = error
                seen.append(str(error))
            except Exception as error:  # each of fsspec's file systems has errors of its own
                problem = error
                time.sleep(WAIT * 2**attempt if attempt < TRIES - 1 else 0)
    reason = " ".join(f"{type(problem).__name__}: {problem}".split())
    raise UserError(f"{url} cannot be copied after {TRIES} tries ({reason}); check the address and the server")


class Differs(Exception):
    """A copy is not what the index says."""


def _differs(path: Path) -> Path:
    return path.with_name(path.name + ".differs")


def forget_differing(folder: Path) -> None:
    """Drop the copies that were not what they must be: the server may have better ones by now.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        for note in folder.glob("*.differs"):
            note.with_suffix("").unlink(missing_ok=True)
            note.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir: {folder} cannot be written ({error.strerror})") from error


def _is_here(path: Path, size: int | None) -> bool:
    return path.is_file() and (size in (None, path.stat().st_size) or _differs(path).exists())


def _copy(url: str, path: Path, size: int | None, sha256: str | None, seen: Collection[str]) -> None:
    """Copy it once. What differs from the index is kept only if an earlier copy differed in the same way."""
    options = {"client_kwargs": {"timeout": PATIENCE}} if url.startswith(("http://", "https://")) else {}
    try:
        system, place = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from error
    with atomic_path(path) as part:
        system.get_file(place, str(part))
        difference = _difference(part, size, sha256)
        if difference is not None:
            if difference not in seen:
                raise Differs(difference)
            log.warning("%s: %s; what can be read of it is used", url, difference)
            write_text(_differs(path), difference + "\n")


def _difference(part: Path, size: int | None, sha256: str | None) -> str | None:
    found = part.stat().st_size
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 is not None else None
    if size in (None, found) and digest == sha256:
        return None
    return f"the server gives {found} bytes with SHA-256 {digest}, the index says {size} and {sha256}"
