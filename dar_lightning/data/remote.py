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

from dar_lightning.errors import MachineFault, UserError, naming
from dar_lightning.files import atomic_path, check_local, file_sha256, write_text

PATIENCE = 900.0  # seconds for which the server of a run's shards may be away
MOST_PATIENCE = 7 * 86400
AT_START = 4.0  # the same before a run has begun: the address may be wrong
WAIT, LONGEST = 0.5, 30.0  # seconds before the second try, doubled after each; and at most
CONNECT, SILENCE = 20, 60  # seconds after which a server counts as away, or as silent
log = logging.getLogger(__name__)


def cache_folder(url: str, cache_dir: str | None, option: str) -> Path:
    """Where the files of a remote folder are kept."""
    check_local(cache_dir, "cache_dir")
    if cache_dir is None:
        raise UserError(f"{option}: {url} is remote, set cache_dir to a folder that its shards are copied to")
    return Path(cache_dir) / hashlib.sha256(url.encode()).hexdigest()[:16]


def fetch(
    url: str,
    path: Path,
    size: int | None = None,
    sha256: str | None = None,
    renew: bool = False,
    patience: float | None = None,
) -> None:
    """Copy a file from a server, unless it is here; of several processes that want it, one does it at a time.

    What fails is tried again for `patience` seconds from the first failure on: after half a second, then after twice as
    long each time, at last every 30 s. None is a few seconds, for a run that has not begun.

    A copy that is not what it must be, `size` bytes that hash to `sha256`, is fetched again, and kept if it is the same
    the second time: most of a shard may be good. `PATH.differs` then says what is wrong, and nothing is fetched again
    until `forget_differing`. With `renew`, it is copied even if it is here.

    Raises:
        FileNotFoundError: The server has no such file.
        MachineFault: The server did not give it for as long as `patience`.
        UserError: The same with `patience` None, or the copy cannot be written.
    """
    note = path.with_name(path.name + ".differs")
    differed: set[str] = set()

    def is_here() -> bool:
        return not renew and path.is_file() and (size in (None, path.stat().st_size) or note.exists())

    def copy() -> None:
        with atomic_path(path) as part:
            _copy(url, part)
            found, digest = part.stat().st_size, file_sha256(part) if sha256 else None
            said = f"the server gives {found} bytes with SHA-256 {digest}, the index says {size} and {sha256}"
            differs = size not in (None, found) or digest != sha256
            if differs and said not in differed:
                differed.add(said)
                raise ValueError(said)
            if differs:  # noted before the copy has its name, so that none is taken for a whole one
                log.warning("%s: %s; what can be read of it is used", url, said)
                write_text(note, said + "\n")

    tries, wait, first = 0, WAIT, 0.0
    while not is_here():
        before = len(differed)
        with naming("cache_dir", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock").acquire()
        try:
            with lock:  # not while it waits: others that want this file need not wait after it
                if not is_here():
                    copy()
            break
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each of fsspec's file systems has errors of its own
            tries, now = tries + 1, time.monotonic()
            first = first or now
            left = first + (AT_START if patience is None else patience) - now
            reason = _reason(error)
            if left <= 0 and not before < len(differed) == 1:  # the second copy decides, whatever the patience
                tried = f"{url} cannot be copied, tried {tries} times in {now - first:.0f} s ({reason})"
                kind = UserError if patience is None else MachineFault
                raise kind(f"{tried}; check the address and the server") from error
            if tries == 1:
                log.warning("%s cannot be copied (%s); tried again for %.0f s", url, reason, left)
            time.sleep(max(0.0, min(wait, left)))
            wait = min(2 * wait, LONGEST)
    if tries:
        log.warning("%s is copied now", url)


def _reason(error: Exception) -> str:
    """An error of a transfer in a line; of a timeout, fsspec keeps no word."""
    if isinstance(error, TimeoutError):
        return f"no connection for {CONNECT} s, or silent for {SILENCE} s"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _copy(url: str, part: Path) -> None:
    options = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout  # what fsspec reads HTTP with

        # however large a shard is, silence ends
        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)}}
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
