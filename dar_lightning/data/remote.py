"""Shards on a server: each is copied whole, once, into a folder on this machine, and is a local file from then on."""

import hashlib
import time
from pathlib import Path

import fsspec
from aiohttp import ClientTimeout
from filelock import FileLock

from dar_lightning.data.decode import BadSample
from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path

TRIES = 4
WAIT = 0.5  # seconds before the second try; doubled after each
PATIENCE = ClientTimeout(total=None, sock_connect=20, sock_read=60)  # however large a shard is, silence ends


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

    Args:
        url: Of any kind that fsspec knows.
        path: The copy.
        size: Bytes that it must have, where known.
        sha256: What its content must hash to, where known.
        renew: Copy it even if it is here.

    Raises:
        FileNotFoundError: The server has no such file.
        BadSample: It is not what it must be, also when copied again.
        UserError: The server does not answer, or the copy cannot be written.
    """
    if _is_here(path, size) and not renew:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir: {path.parent} cannot be made ({error.strerror})") from error
    with FileLock(f"{path}.lock"):
        if _is_here(path, size) and not renew:
            return
        for attempt in range(TRIES):
            try:
                return _copy(url, path, size, sha256)
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # each of fsspec's file systems has errors of its own
                problem = error
            if attempt < TRIES - 1:
                time.sleep(WAIT * 2**attempt)
    if isinstance(problem, BadSample):
        raise problem
    reason = " ".join(f"{type(problem).__name__}: {problem}".split())
    raise UserError(f"{url} cannot be copied after {TRIES} tries ({reason}); check the address and the server")


def _is_here(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def _copy(url: str, path: Path, size: int | None, sha256: str | None) -> None:
    options = {"client_kwargs": {"timeout": PATIENCE}} if url.startswith(("http://", "https://")) else {}
    try:
        system, place = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from error
    with atomic_path(path) as part:
        system.get_file(place, str(part))
        found = part.stat().st_size
        if size not in (None, found):
            raise BadSample(f"the server gives {found} bytes, the index says {size}")
        if sha256 is not None:
            with part.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise BadSample("the server gives another content than the index says (SHA-256)")
