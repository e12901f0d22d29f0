"""Image files below a folder: which count, and which are left out (hidden and system folders, other formats)."""

import os
from pathlib import Path
from typing import NamedTuple

from dar_lightning.data.decode import image_suffixes
from dar_lightning.errors import UserError

# What operating systems and network drives put beside people's files, in lower case.
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "#recycle"}
SYSTEM_FILES = {"thumbs.db", "desktop.ini"}


class ImageFiles(NamedTuple):
    """What lies below a folder: names sorted within each folder, its files before its folders."""

    images: list[Path]
    others: list[Path]  # files that are not named like images
    hidden: list[Path]  # hidden and system files and folders; what lies in such a folder is not listed


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or the operating system's."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS | SYSTEM_FILES


def list_images(folder: Path) -> ImageFiles:
    """The image files anywhere below a folder; a folder that links lead to several times is read once."""
    found, seen = ImageFiles([], [], []), set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found.hidden.extend(Path(parent, name) for name in sorted(names) + sorted(folders) if is_hidden(name))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for path in (Path(parent, name) for name in sorted(names) if not is_hidden(name)):
            (found.images if path.suffix.lower() in image_suffixes() else found.others).append(path)
    return found


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would leave its images out without a word."""
    raise UserError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away"
    ) from error
