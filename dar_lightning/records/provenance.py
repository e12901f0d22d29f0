"""Provenance: which code made a result, with which libraries, on which device, by which command."""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dar_lightning import __version__

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "lightning", "torchmetrics", "torchvision", "timm", "torch-fidelity")
HASHED = (".py", ".json", ".safetensors")  # of the package's files, what results may depend on
GIT_SECONDS = 5
FILE = "provenance.json"  # in folders that several processes may fill: a list


def provenance(device: "torch.device", precision: str) -> dict[str, Any]:
    """What made a result, for JSON: `code` (see `read_code`), `versions`, `device`, `precision`, `command`.

    `precision` is the Trainer's, or the dtype of the weights. The code is looked at once a process: call this when the
    work begins, as files may be edited while it runs.
    """
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # torch-fidelity is optional
            versions[name] = version(name)
    program, words = Path(sys.argv[0]), sys.orig_argv
    if program.stem == "dar" or program.parent == PACKAGE:  # python -m dar_lightning
        words = ["dar", *sys.argv[1:]]
    made = {"code": _code_at_first_call(), "versions": versions, "device": device_name(device)}
    return made | {"precision": precision, "command": shlex.join(words)}


def read_code() -> dict[str, Any]:
    """The package as its files are now: `version`, `commit`, `changed`, `sha256`.

    `commit` is of the repository that tracks the package; `changed` says whether tracked files differ from it, or the
    package has new modules. Both are None for an installed package, and where git does not answer. Equal `sha256`, of
    the package's own files, are the same code, with or without a commit.
    """
    commit = changed = None
    if _git("ls-files", "__init__.py"):  # not a repository in which installed packages merely lie
        commit = _git("rev-parse", "HEAD")
    if commit is not None:
        edited = _git("status", "--porcelain", "--untracked-files=no")
        new = _git("ls-files", "--others", "--exclude-standard", "*.py")
        changed = None if None in (edited, new) else bool(edited or new)
    return {"version": __version__, "commit": commit, "changed": changed, "sha256": _package_sha256()}


def code_name(code: dict[str, Any] | None) -> str:
    """What `read_code` found, in words; None for results of versions before, which did not note it."""
    if code is None:
        return "code that was not noted"
    commit = "" if code["commit"] is None else f", commit {code['commit'][:12]}"
    changes = " with changes" if code["changed"] else ""
    return f"dar_lightning {code['version']}{commit}{changes} (package {str(code['sha256'])[:8]})"


def device_name(device: "torch.device") -> str:
    """What computes, by the maker's name where there is one."""
    if device.type != "cuda":
        return f"{device.type} ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name(device)


_code_at_first_call = cache(read_code)


def _git(*words: str) -> str | None:
    """What git prints in the package's folder, None where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # a status takes no lock from the user's own git
    options = {"cwd": PACKAGE, "env": environment, "stderr": subprocess.DEVNULL, "timeout": GIT_SECONDS}
    try:
        return subprocess.check_output(["git", *words], **options).decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _package_sha256() -> str | None:
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in HASHED):
            if not path.is_relative_to(PACKAGE / "shipped" / "data"):  # a wheel has photos there
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(PACKAGE).as_posix()} {content}\n".encode())
    except OSError:  # a file went away meanwhile
        return None
    return digest.hexdigest()
