"""Sets of images to measure: an npz, a folder, shards, or a pipeline that draws them; read in batches, never whole."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from dar_lightning.ar import gumbel
from dar_lightning.data.captions import read_captions
from dar_lightning.data.decode import BadSample, decode_rgb
from dar_lightning.data.image_dataset import decode, describe, read_label
from dar_lightning.data.image_files import list_images
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import INDEX, ShardIndex
from dar_lightning.data.transforms import center_crop, to_tensor
from dar_lightning.devices import dtype_name
from dar_lightning.errors import UserError, one_line, require
from dar_lightning.files import check_local, find_shipped
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import ROWS, draw_rows
from dar_lightning.generation.npz import UNREADABLE
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.records.drawn import CAPTIONS, NAMES, read_drawn

Batch = tuple[Tensor, Tensor | None]  # uint8 images (B, 3, H, W) and, where the set has labels, int64 (B,)


class ImageSet(Protocol):
    """Images of one size, in a fixed order."""

    protocol: dict[str, Any]  # what is needed to measure the same images again, for JSON
    labelled: bool  # whether batches have labels
    classes: tuple[str, ...]  # names in the order of the labels; empty where nobody knows them
    captions: Sequence[str]  # of each image; "" where nobody knows it

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The set once, in order: this rank's are rank, rank + world_size, ...; of drawn images, in whole batches."""


def with_progress(images: ImageSet, batch_size: int, title: str) -> Iterator[Batch]:
    """The batches of a set, under a progress bar that counts images."""
    with tqdm(total=len(images), desc=title, unit="image") as bar:
        for batch in images.batches(batch_size):
            yield batch
            bar.update(len(batch[0]))


class NpzImages:
    """The ADM sample format: `arr_0` uint8 (n, H, W, 3), optionally `labels` (n,), or ADM's `arr_1`.

    Decompressed as it is read. The record beside it, of a drawing, names the classes.
    """

    def __init__(self, path: Path, option: str) -> None:
        self.path, self.name = path, f"{option}: arr_0 of {path}"
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                self.shape, fortran, dtype = _npy_header(file)
            with np.load(path) as arrays:
                labels = arrays.get("labels")
                if labels is None and "arr_1" in arrays and arrays["arr_1"].dtype.kind in "iu":
                    labels = arrays["arr_1"]
        except KeyError as error:
            raise UserError(f"{option}: {path} holds no arr_0, which must be uint8 (n, H, W, 3)") from error
        except UNREADABLE as error:
            raise UserError(f"{option}: {path} is not a readable npz file ({error})") from error
        order = " in Fortran order: store np.ascontiguousarray of it" if fortran else ""
        if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[3] != 3:
            raise UserError(f"{self.name} must be uint8 (n, H, W, 3), values 0 to 255; is {dtype} {self.shape}{order}")
        self.size, self.labelled, self.labels = self.shape[1:3], labels is not None, None
        if labels is not None:
            if labels.shape != self.shape[:1] or labels.dtype.kind not in "iu":
                found = f"{labels.dtype} {labels.shape}"
                raise UserError(f"{option}: labels of {path} must be {len(self)} integers, are {found}")
            self.labels = torch.from_numpy(labels.astype(np.int64))
        self.protocol = {"npz": str(path)}
        record = read_drawn(path) or {}
        self.classes = tuple(record.get(NAMES, ()))
        self.captions = record.get(CAPTIONS, [""] * len(self))

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _npy_header(file)
            for numbers in torch.arange(len(self)).split(batch_size * world_size):
                shape = len(numbers), *self.shape[1:]
                try:
                    images = torch.frombuffer(bytearray(file.read(math.prod(shape))), dtype=torch.uint8).view(shape)
                except (*UNREADABLE, RuntimeError) as error:  # the last one where it ends early
                    raise UserError(f"{self.name} is damaged ({one_line(error)}); write it again") from error
                if len(mine := numbers[rank::world_size]):
                    images = images[rank::world_size].permute(0, 3, 1, 2)
                    yield images, None if self.labels is None else self.labels[mine]


def _npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of a .npy stream, which is left at its first value."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)  # later versions are for names that no array of numbers has


class _EncodedImages:
    """Images that are decoded one by one, and cropped if a size is given."""

    labelled = False
    classes: tuple[str, ...] = ()

    @property
    def captions(self) -> list[str]:
        return [""] * len(self)

    def __init__(self, source: str, kind: str, option: str, image_size: int | None) -> None:
        self.option, self.image_size = option, image_size
        self.protocol = {kind: source, "crop": "none" if image_size is None else f"ADM centre crop to {image_size}"}

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        size, first = self.image_size, None
        read = map(self._read, range(rank, len(self), world_size))
        items = ((to_tensor(center_crop(image, size) if size else image), label) for image, label in read)
        while chunk := list(islice(items, batch_size)):
            images, labels = zip(*chunk, strict=True)
            first = first or images[0].shape
            if wrong := [image.shape for image in images if image.shape != first]:
                sizes = " and ".join(f"{height}x{width}" for _, height, width in (first, wrong[0]))
                raise UserError(f"{self.option}: images of different sizes, {sizes}; crop them with --image_size")
            yield torch.stack(images), torch.tensor(labels) if self.labelled else None


class FolderImages(_EncodedImages):
    """Image files anywhere below a folder, in the order of their paths; without labels."""

    def __init__(self, path: Path, option: str, image_size: int | None) -> None:
        super().__init__(str(path), "folder", option, image_size)
        found = list_images(path)
        self.files = sorted(found.images)
        if left_out := found.others + found.hidden:
            print(f"{option}: {len(left_out)} files and folders of {path} are no images: {left_out[0].name!a}, ...")

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, number: int) -> tuple[Image, int | None]:
        try:
            return decode_rgb(self.files[number].read_bytes()), None
        except (BadSample, OSError) as error:
            raise UserError(f"{self.option}: {self.files[number]} cannot be decoded ({error})") from error


class ShardImages(_EncodedImages):
    """WebDataset shards; labelled, if that is wanted, when their samples have a `.cls` member."""

    def __init__(self, source: str, option: str, image_size: int | None, labels: bool = True) -> None:
        super().__init__(source, "shards", option, image_size)
        check_local(source, option)  # there is no cache_dir here
        index = ShardIndex.load(source, option)
        self.reader, self.classes = ShardReader(index), index.classes
        with self._naming(0):
            self.labelled = labels and "cls" in self.reader[0][2]

    def __len__(self) -> int:
        return len(self.reader)

    def _read(self, number: int) -> tuple[Image, int | None]:
        with self._naming(number):
            members = self.reader[number][2]
            return decode(members), read_label(members, None) if self.labelled else None

    @cached_property
    def captions(self) -> list[str]:
        """The first caption of each image, the one that validation takes, too."""
        found = (read_captions(self.reader[number][2]) for number in range(len(self)))
        return [texts[0] if texts else "" for texts in found]

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        try:
            yield
        except BadSample as bad:
            raise UserError(f"{self.option}: {describe(self.reader, number, bad)}") from bad


class DrawnImages:
    """Samples of a pipeline: image i depends on (seed, i) alone, and is of class i mod num_classes, if there are any.

    A forward pass has `rows` images, whatever batch size is asked for, since that changes the rounding. `num_steps` and
    `options` are those of `DARPipeline.stream`: guidance, temperature, top_k, top_p, solver.
    """

    def __init__(
        self,
        pipeline: DARPipeline,
        count: int,
        seed: int,
        num_steps: int | None = None,
        rows: int = ROWS,
        **options: Any,
    ) -> None:
        self.pipeline, self.count, self.seed, self.rows = pipeline, count, seed, rows
        self.classes = pipeline.classes
        self.num_steps = pipeline.tokenizer.config.num_groups if num_steps is None else num_steps
        pipeline.guidance_scales(options.get("guidance", 1.0))  # says so if it does not fit
        self.num_labels, self.captions = pipeline.num_labels, [""] * count
        self.labelled = pipeline.ar.condition.takes == "labels"
        # What `generate` does without these is said in the protocol, too.
        self.options = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "solver": "adams2"} | options

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "tokenizer_sha256": model_sha256(self.pipeline.tokenizer),
            "ar_sha256": model_sha256(self.pipeline.ar),
            "ema": self.pipeline.averaged,
            "classes": "balanced: image i is of class i mod num_classes" if self.labelled else "none: no condition",
            "seed": self.seed,
            "token_draws": gumbel.METHOD,
            "steps": self.num_steps,
            "rows": self.rows,
            "dtype": dtype_name(self.pipeline.tokenizer.dtype),
            "device": self.pipeline.device.type,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        } | self.options

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        options = self.options | {"num_steps": self.num_steps}
        for numbers in torch.arange(self.count).split(self.rows)[rank::world_size]:
            labels = numbers % self.num_labels
            members = list(zip(numbers.tolist(), labels.tolist(), strict=True))
            images = draw_rows(self.pipeline, members, self.seed, self.rows, options).cpu()
            yield images, labels if self.labelled else None


def open_images(source: str, option: str, image_size: int | None) -> ImageSet:
    """The images of an npz, of a folder of shards or a pattern of them, or of a folder of image files.

    `option` is what the user calls the source, for error lines. Encoded images get ADM's centre crop to `image_size`,
    None leaves them as they are.
    """
    path = Path(find_shipped(source))
    if path.suffix == ".npz" and path.is_file():
        images = NpzImages(path, option)
    elif source.endswith(".tar") or (path / INDEX).is_file() or next(path.glob("*.tar"), None):
        images = ShardImages(source, option, image_size)
    elif path.is_dir():
        images = FolderImages(path, option, image_size)
    else:
        what = "is a file of another kind" if path.exists() else "does not exist"
        raise UserError(f"{option}: {source} {what}; give an npz file, or a folder of shards or of images")
    require(len(images) > 0, f"{option}: {source} holds no images")
    return images
