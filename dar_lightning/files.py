"""Atomic writes, folder locks, JSON, classes of the user's files, and the files that come with the package."""

import errno
import hashlib
import json
import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dar_lightning.errors import UserError, naming, one_line, phase, require

# The disk is full, or became read-only.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems say that have none
SHIPPED = Path(__file__).parent / "shipped"  # in a wheel also experiments/ and the embedded data
TREES = ("experiments", "data/fruit64", "data/emoji64", "dar_lightning/shipped")


def is_url(path: str | Path | None) -> bool:
    """Whether it is a URL (`s3://...`, or `s3:/...` after Path has taken a slash), and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def check_local(path: str | Path | None, option: str) -> None:
    """Refuse a URL (`s3://...`) where something is written: a folder of that name would be made here.

    Raises:
        UserError: it is one; the line names `option`.
    """
    if is_url(path):
        raise UserError(f"{option}: {path} is a URL; give a folder, into which the storage may be mounted")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, then rename it: an atomic write, synced to the disk.

    An error, a kill or a power cut in between leaves what was there before. The folder is made if missing.

    Raises:
        UserError: if the folder cannot be written, or the disk is full, or it is a URL.
    """
    check_local(path, "cannot write")
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


def check_same(
    what: str,
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    hint: str = "choose another folder or delete this one",
) -> None:
    """Refuse results of other settings than those that are wanted now.

    Raises:
        UserError: a setting is another one; the line is `what`, the setting and `hint`.
    """
    for name, value in wanted.items():
        if found.get(name) != value:
            now = f"{name} {found.get(name)}, now it is {value}"
            raise UserError(f"output: {what} {now}; {hint}")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any, indent: int | None = 2, ensure_ascii: bool = True) -> None:
    """Write values as a JSON file, atomically; the options are those of json.dumps."""
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: str | Path, option: str) -> Iterator[None]:
    """Make a folder and lock it against other processes, on this machine or another, until this one ends.

    The lock is the operating system's (flock), which goes with its process, however that ends. NFS hands it to the
    server: other machines see it, and it goes when the server gives up a dead one, after its lease (90 s as a rule).
    Where the file system has no locks, a line says so, and it goes on. A folder that was made for work which an error
    ends before it begins is deleted again.

    Raises:
        UserError: another process has locked it, or it cannot be written; the line names `option`.
    """
    check_local(folder, option)
    folder, lock = Path(folder), None
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"{option}: another process is writing to {folder}; wait for it or choose another") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise UserError(f"{option}: cannot write {folder} ({error.strerror})") from error
        told = f"WARNING: {option}: the file system of {folder} has no locks; let no other process write there"
        print(told, file=sys.stderr, flush=True)
    with lock or nullcontext():
        try:
            yield
        except Exception:
            if made and not phase.working:
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):  # somebody else has put something there
                    for each in made[1:]:
                        each.rmdir()
            raise


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
    with naming(f"{option}: not {kinds}"):  # the user's file may raise anything at all
        return pkgutil.resolve_name(path)


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


def load_yaml(text: str, name: str) -> Any:
    """What a YAML text says; `name` is its file's, for error lines. What is no YAML raises PyYAML's error.

    Raises:
        UserError: a mapping has a key twice, of which YAML would drop the first.
    """
    check_keys(text, name)
    return yaml.safe_load(text)


def refuse_repeated_keys() -> None:
    """Let jsonargparse refuse configs that have a key twice, in files and in options; once for a process."""
    from jsonargparse import get_loader, set_loader  # not needed by workers, who import this module too

    load = get_loader("yaml")
    if load.__name__ == "load_checked":
        return

    def load_checked(text: str, path: str = "") -> Any:
        if "\n" in text or "{" in text:
            check_keys(text, str(path) or "a YAML text")
        return load(text)

    set_loader("yaml", load_checked, (yaml.YAMLError,))


def check_keys(text: str, name: str) -> None:
    """Refuse a YAML text with a key twice in one mapping: a UserError says which, and where. Other flaws are no error.

    Merge keys (`<<`) may be overridden, which is what they are for.
    """
    try:
        nodes = [yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    except yaml.YAMLError:  # whoever loads it says so
        return
    seen = set()  # an alias is the node that it stands for
    while nodes:
        if (node := nodes.pop()) is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in lines:
                    places = f"in line {lines[key.value]} and in line {key.start_mark.line + 1}"
                    raise UserError(f"{name}: {key.value!r} is there twice, {places}; put the two together")
                lines[key.value] = key.start_mark.line + 1
