"""Atomic writes, folder locks, JSON, classes of the user's files, and the files that come with the package."""

import errno
import hashlib
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dar_lightning.errors import UserError, one_line, require

# The disk is full, or became read-only.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
SHIPPED = Path(__file__).parent / "shipped"  # in a wheel also experiments/ and data/fruit64/
TREES = ("experiments", "data/fruit64", "dar_lightning/shipped")


@contextmanager
def users_path(option: str) -> Iterator[None]:
    """Turn an OSError into a UserError that names the option: for opening or making what the user named.

    Everywhere else such an error is one of this program, and stays a traceback.
    """
    try:
        yield
    except OSError as error:
        reason = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        raise UserError(f"{option}: {reason}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, then rename it: an atomic write, synced to the disk.

    An error, a kill or a power cut in between leaves what was there before. The folder is made if missing.

    Raises:
        UserError: if the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; some libraries put a private file in its place
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        yield part
        part.chmod(mode)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)  # until its folder is on the disk too, a power cut can undo the renaming
    except Exception as error:
        # torch's zip writer raises a RuntimeError of its own while it handles the disk's error
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError) or reason.errno not in DISK:
            raise
        raise UserError(f"cannot write {path}: {reason.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: str | Path, option: str) -> Iterator[None]:
    """Make a folder and lock it against other processes, on this machine or another, until this one ends.

    Raises:
        UserError: another process has locked it, or it cannot be written; the line names `option`.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = FileLock(Path(folder) / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{option}: another process is writing to {folder}; wait for it or choose another") from error
    except OSError as error:
        raise UserError(f"{option}: cannot write {folder} ({error.strerror})") from error
    with lock:
        yield


def find_shipped(path: str) -> str:
    """A path as it is, or else the file or folder of that relative name that comes with the package.

    `experiments/ar/B.yaml` and `data/fruit64/val` are found from any folder, whether the package is a clone or a wheel.
    What the working directory has comes first.
    """
    if not any(Path(path).is_relative_to(name) for name in TREES) or Path(path).exists():
        return path
    places = [root / path for root in (SHIPPED, SHIPPED.parents[1])]
    return next((str(place) for place in places if place.exists()), path)


def load_class(path: str, option: str, kinds: str) -> Any:
    """What an import path names, `my_file.MyClass`; the current folder is searched too, as with `python -m`.

    Raises:
        UserError: there is nothing of that name; the line begins with `option` and says what it could be, `kinds`.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}: not {kinds} ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: if the file is missing or holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the folder holds no complete model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    kind = type(values).__name__
    require(isinstance(values, dict), f"{path} holds a {kind}: need an object of hyperparameters")
    return values
