"""Sets of images to measure: an npz, a folder, shards, or a pipeline that draws them; read in batches, never whole."""

import math
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dar_lightning.ar import gumbel
from dar_lightning.data.decode import BadSample
from dar_lightning.data.image_dataset import decode, describe, read_label
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import INDEX, ShardIndex
from dar_lightning.data.transforms import center_crop, to_tensor
from dar_lightning.devices import dtype_name
from dar_lightning.errors import UserError, one_line
from dar_lightning.files import find_shipped
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import ROWS, draw_rows
from dar_lightning.generation.npz import UNREADABLE
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.metrics.image_set import Batch, ImageSet

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class NpzImages:
    """The ADM sample format: `arr_0` uint8 (n, H, W, 3), optionally `labels` (n,). Decompressed as it is read."""

    def __init__(self, path: Path, option: str) -> None:
        self.path, self.option = path, option
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                self.shape, fortran, dtype = _npy_header(file)
            with np.load(path) as arrays:
                labels = arrays.get("labels")
        except KeyError as error:
            raise UserError(f"{option}: {path} holds no arr_0, which must be uint8 (n, H, W, 3)") from error
        except UNREADABLE as error:
            raise UserError(f"{option}: {path} is not a readable npz file ({error})") from error
        if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[3] != 3:
            raise UserError(
                f"{option}: arr_0 of {path} must be uint8 (n, H, W, 3), values 0 to 255; is {dtype} {self.shape}"
            )
        if labels is not None and (labels.shape != self.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(
                f"{option}: labels of {path} must be {self.shape[0]} integers, are {labels.dtype} {labels.shape}"
            )
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.labelled = labels is not None
        self.protocol = {"npz": str(path)}

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Of the images, (H, W)."""
        return self.shape[1:3]

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        mine = slice(rank, None, world_size)
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _npy_header(file)
            for start in range(0, len(self), batch_size * world_size):
                count = min(batch_size * world_size, len(self) - start)
                try:
                    content = bytearray(file.read(count * math.prod(self.shape[1:])))
                    images = torch.frombuffer(content, dtype=torch.uint8).view(count, *self.shape[1:])
                except (*UNREADABLE, RuntimeError) as error:  # the last one where it ends early
                    place = f"{self.option}: arr_0 of {self.path}"
                    raise UserError(f"{place} is damaged ({one_line(error)}); write it again") from error
                labels = None if self.labels is None else self.labels[start : start + count][mine]
                if count > rank:
                    yield images[mine].permute(0, 3, 1, 2), labels


class FolderImages:
    """Image files anywhere below a folder, in the order of their paths; without labels."""

    labelled = False

    def __init__(self, path: Path, option: str, image_size: int | None) -> None:
        self.option, self.image_size = option, image_size
        self.files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        self.protocol = {"folder": str(path), "crop": _crop_name(image_size)}

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        return _stack(((self._read(file), None) for file in self.files[rank::world_size]), batch_size, self.option)

    def _read(self, file: Path) -> Tensor:
        try:
            image = Image.open(file).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{self.option}: {file} cannot be decoded ({error})") from error
        return _cropped(image, self.image_size)


class ShardImages:
    """WebDataset shards; labelled, if that is wanted, when their samples have a `.cls` member."""

    def __init__(self, source: str, option: str, image_size: int | None, labels: bool = True) -> None:
        self.option, self.image_size = option, image_size
        self.reader = ShardReader(ShardIndex.load(source, option))
        self.labelled = labels and "cls" in self._members(0)
        self.protocol = {"shards": source, "crop": _crop_name(image_size)}

    def __len__(self) -> int:
        return len(self.reader)

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        return _stack(map(self._read, range(rank, len(self), world_size)), batch_size, self.option)

    def _read(self, number: int) -> tuple[Tensor, int | None]:
        members = self._members(number)
        try:
            image = _cropped(decode(members), self.image_size)
            return image, read_label(members, None) if self.labelled else None
        except BadSample as bad:
            raise UserError(f"{self.option}: {describe(self.reader, number, bad)}") from bad

    def _members(self, number: int) -> dict[str, bytes]:
        try:
            return self.reader[number][2]
        except BadSample as bad:
            raise UserError(f"{self.option}: {describe(self.reader, number, bad)}") from bad


class DrawnImages:
    """Class-balanced samples of a pipeline: image i is of class i mod num_classes and depends on (seed, i) alone.

    Args:
        pipeline: what draws, where it is.
        count: number of images.
        seed: with i it seeds the generator of image i, so that order and ranks do not matter.
        num_steps: diffusion steps; None is one per group of tokens.
        rows: images per forward pass, whatever batch size is asked for: it changes the rounding.
        options: of `DARPipeline.stream`: guidance, temperature, top_k, top_p, solver.
    """

    labelled = True

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
        self.num_steps = pipeline.tokenizer.config.num_groups if num_steps is None else num_steps
        # What `generate` does without these is said in the protocol, too.
        defaults = {"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "solver": "adams2"}
        self.options = defaults | options

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "tokenizer_sha256": model_sha256(self.pipeline.tokenizer),
            "ar_sha256": model_sha256(self.pipeline.ar),
            "ema": self.pipeline.averaged,
            "classes": "balanced: image i is of class i mod num_classes",
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
            labels = numbers % self.pipeline.ar.config.num_classes
            members = list(zip(numbers.tolist(), labels.tolist(), strict=True))
            yield draw_rows(self.pipeline, members, self.seed, self.rows, options).cpu(), labels


def open_images(source: str, option: str, image_size: int | None) -> ImageSet:
    """The images of an npz, of a folder of shards or a pattern of them, or of a folder of image files.

    Args:
        source: the path.
        option: what the user calls it, for error lines.
        image_size: encoded images get ADM's centre crop to this size; None leaves them as they are.
    """
    path = Path(find_shipped(source))
    if path.suffix == ".npz" and path.is_file():
        images = NpzImages(path, option)
    elif source.endswith(".tar") or (path / INDEX).is_file() or next(path.glob("*.tar"), None):
        images = ShardImages(source, option, image_size)
    elif path.is_dir():
        images = FolderImages(path, option, image_size)
    else:
        raise UserError(f"{option}: {source} does not exist; give an npz file, or a folder of shards or of images")
    if len(images) == 0:
        raise UserError(f"{option}: {source} holds no images")
    return images


def _npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of a .npy stream, which is left at its first value."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _cropped(image: Image.Image, image_size: int | None) -> Tensor:
    return to_tensor(image if image_size is None else center_crop(image, image_size))


def _crop_name(image_size: int | None) -> str:
    return "none" if image_size is None else f"ADM centre crop to {image_size}"


def _stack(items: Iterator[tuple[Tensor, int | None]], batch_size: int, option: str) -> Iterator[Batch]:
    first = None
    while chunk := list(islice(items, batch_size)):
        first = chunk[0][0].shape if first is None else first
        for image, _ in chunk:
            if image.shape != first:
                sizes = f"{first[1]}x{first[2]} and {image.shape[1]}x{image.shape[2]}"
                raise UserError(f"{option}: images of different sizes, {sizes}; crop them with --image_size")
        labels = None if chunk[0][1] is None else torch.tensor([label for _, label in chunk])
        yield torch.stack([image for image, _ in chunk]), labels
