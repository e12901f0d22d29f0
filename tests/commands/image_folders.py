"""Folders of small pictures, and what `dar shard` made of them."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

ROOT = Path(__file__).parents[2]
CLASSES = ("apple", "fig", "plum")
COUNTS = (7, 5, 10)


def encoded(number: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """A smooth picture of its own for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, kind)
    return file.getvalue()


def write_images(folder: Path, contents: dict[str, bytes]) -> Path:
    """Files by their names below a folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tree(folder: Path, counts=COUNTS, size=(40, 30)) -> Path:
    """An ImageFolder: FOLDER/apple/0000.jpg, ..."""
    names = [f"{name}/{i:04d}.jpg" for name, count in zip(CLASSES, counts, strict=True) for i in range(count)]
    return write_images(folder, {name: encoded(number, size=size) for number, name in enumerate(names)})


def read(folder: Path) -> list[dict]:
    """All samples as webdataset itself reads them, in the order of the files."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def process(*words: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "dar_lightning", "shard", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)
