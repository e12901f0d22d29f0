"""Download and cache of remote shards, checked by size and SHA-256.

fsspec does the transfer. Its caching file systems (`filecache`, `simplecache`) write under the final name and take no
lock: two workers would both fetch a shard, and a transfer that broke off would count as a whole file.
"""

import hashlib
import logging
import time
from pathlib import Path

import fsspec
from filelock import FileLock

from dar_lightning.errors import UserError, naming
from dar_lightning.files import atomic_path, file_sha256, write_text

TRIES = 4
WAIT = 0.5  # seconds before the second try; doubled after each
log = logging.getLogger(__name__)


def is_remote(source: str) -> bool:
    """Whether it is a URL (`https://...`, `s3://...`), and no path."""
    return "://" in source


def cache_folder(url: str, cache_dir: str | None, option: str) -> Path:
    """Where the files of a remote folder are kept."""
    if cache_dir is None:
        raise UserError(f"{option}: {url} is remote, set cache_dir to a folder that its shards are copied to")
    return Path(cache_dir) / hashlib.sha256(url.encode()).hexdigest()[:16]


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None, renew: bool = False) -> None:
    """Copy a file from a server, unless it is here; of several processes that want it, one does it.

    A copy that is not what it must be, `size` bytes that hash to `sha256`, is fetched again, and kept if it is the same
    the second time: most of a shard may be good. `PATH.differs` then says what is wrong, and nothing is fetched again
    until `forget_differing`. With `renew`, it is copied even if it is here.

    Raises:
        FileNotFoundError: The server has no such file.
        UserError: The server does not answer, or the copy cannot be written.
    """
    note = path.with_name(path.name + ".differs")

    def is_here() -> bool:
        return not renew and path.is_file() and (size in (None, path.stat().st_size) or note.exists())

    if is_here():
        return
    with naming("cache_dir", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()
    problems: list[str] = []
    with lock:
        while not is_here():
            try:
                with atomic_path(path) as part:
                    _copy(url, part)
                    found, digest = part.stat().st_size, file_sha256(part) if sha256 else None
                    said = f"the server gives {found} bytes with SHA-256 {digest}, the index says {size} and {sha256}"
                    differs = size not in (None, found) or digest != sha256
                    if differs and said not in problems:
                        raise ValueError(said)
                    if differs:  # noted before the copy has its name, so that none is taken for a whole one
                        log.warning("%s: %s; what can be read of it is used", url, said)
                        write_text(note, said + "\n")
                return
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # each of fsspec's file systems has errors of its own
                problems.append(str(error))
                if len(problems) == TRIES:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    raise UserError(
                        f"{url} cannot be copied after {TRIES} tries ({reason}); check the address and the server"
                    ) from error
                time.sleep(WAIT * 2 ** (len(problems) - 1))


def _copy(url: str, part: Path) -> None:
    options = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout  # what fsspec reads HTTP with

        # however large a shard is, silence ends
        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=20, sock_read=60)}}
    try:
        system, place = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from error
    system.get_file(place, str(part))


def forget_differing(folder: Path) -> None:
    """Drop the copies that were not what they must be: the server may have better ones by now."""
    with naming("cache_dir", OSError):
        for note in folder.glob("*.differs"):
            note.with_suffix("").unlink(missing_ok=True)
            note.unlink(missing_ok=True)
