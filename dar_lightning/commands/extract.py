"""`dar extract`: run a tokenizer over image shards, once, and keep the tokens."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dar_lightning.data import transforms
from dar_lightning.data.codes import CodesIndex, describe, read_header, write_codes
from dar_lightning.data.imagenet import decode, read_label
from dar_lightning.data.shards import INDEX, Shard, ShardIndex, ShardReader
from dar_lightning.data.stream import sample_generator
from dar_lightning.errors import UserError
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import fingerprint

Crops = Literal["center", "center_flip", "ten_crop", "random"]


def extract(
    tokenizer: str,
    shards: str,
    output: str,
    crops: Crops = "ten_crop",
    random_crops: int = 10,
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
) -> None:
    """Tokenize image shards into token shards for CodesDataModule.

    One file is written per image shard, whole or not at all, and the index last: a run that was interrupted goes on
    with the shards that are missing, and a finished one is left alone. With several devices, each takes a part of the
    shards.

    Args:
        tokenizer: Folder of a tokenizer (config.json, model.safetensors) or its Hugging Face repository.
        shards: Image shards: a folder, one tar, or a brace pattern.
        output: Folder for the token shards.
        crops: Views of each image: `center` (1), `center_flip` (2: as it is and mirrored), `ten_crop` (10: LlamaGen's,
            from 1.1 times the size), `random` (ADM random crops and flips).
        random_crops: Number of views for `random`.
        image_size: Side of the crops in pixels; the tokenizer's own when left out.
        batch_size: Crops per forward pass and device.
        num_workers: Worker processes that decode and crop.
        seed: Of the random crops.
        accelerator: Lightning's: `auto`, `cpu`, `gpu`, ...
        devices: Lightning's: number of devices, or `auto`.
        precision: Lightning's. Lower precision changes a few tokens.

    Raises:
        UserError: The tokenizer or the shards cannot be read, or `output` holds something else.
    """
    index = ShardIndex.load(shards, "shards")
    model = SequentialDiffusionTokenizer.from_pretrained(tokenizer)
    size = image_size or model.config.image_size
    views = {"center": 1, "center_flip": 2, "ten_crop": 10, "random": random_crops}[crops]
    if views < 1:
        raise UserError(f"random_crops: {random_crops} is not a number of crops, give at least 1")
    made_by = {
        "tokenizer": fingerprint(model),
        "crops": crops,
        "num_crops": views,
        "image_size": size,
        "seed": seed if crops == "random" else None,
        "precision": precision,
    }
    root = Path(output)
    if (root / INDEX).exists():
        _refuse_others(CodesIndex.load(root, "output"), made_by, index)
    missing = [number for number, shard in enumerate(index.shards) if not _is_done(root, shard, made_by)]
    if not missing and (root / INDEX).exists():
        print(f"{output} is complete: {index.num_samples} images x {views} crops x {model.config.num_tokens} tokens")
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {output} cannot be made ({error.strerror})") from error

    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # ExtractData gives every rank whole shards
            callbacks=[ShardWriter(root, index, made_by, model.config.codebook_size)],
        )
    except MisconfigurationException as error:
        raise UserError(f"accelerator {accelerator}, devices {devices}: {' '.join(str(error).split())}") from error
    if missing:
        data = ExtractData(index, missing, crops, views, size, seed, max(1, batch_size // views), num_workers)
        trainer.predict(Extractor(model), datamodule=data, return_predictions=False)
        trainer.strategy.barrier("every rank has written its shards")
    if trainer.is_global_zero:
        entries = tuple(describe(root / _name(shard), shard.samples) for shard in index.shards)
        CodesIndex(
            root=root,
            tokenizer=made_by["tokenizer"],
            tokenizer_config=model.config.to_dict(),
            crops=crops,
            num_crops=views,
            image_size=size,
            num_tokens=model.config.num_tokens,
            codebook_size=model.config.codebook_size,
            classes=index.classes,
            shards=entries,
        ).save()
        total = sum(entry.bytes for entry in entries) / 1e6
        print(
            f"{index.num_samples} images x {views} crops x {model.config.num_tokens} tokens, {total:.1f} MB: {output}"
        )


def _name(shard: Shard) -> str:
    return Path(shard.name).with_suffix(".safetensors").name


def _is_done(root: Path, shard: Shard, made_by: dict[str, Any]) -> bool:
    """Whether a token shard is there already; one of another tokenizer or other crops is refused."""
    path = root / _name(shard)
    if not path.exists():
        return False
    header = read_header(path)
    expected = made_by | {"source": _source(shard)}
    for name, value in expected.items():
        if header["made_by"].get(name) != value:
            raise UserError(
                f"output: {path} was made with {name} {header['made_by'].get(name)}, now it is {value}; "
                "choose another folder or delete this one"
            )
    return True


def _source(shard: Shard) -> list:
    return [shard.name, shard.samples, shard.bytes]


def _refuse_others(found: CodesIndex, made_by: dict[str, Any], index: ShardIndex) -> None:
    names, wanted = [shard.name for shard in found.shards], [_name(shard) for shard in index.shards]
    if found.tokenizer != made_by["tokenizer"]:
        raise UserError(
            f"output: {found.root} holds tokens of tokenizer {found.tokenizer[:12]}, this one is "
            f"{made_by['tokenizer'][:12]}; choose another folder or delete it"
        )
    if names != wanted:
        raise UserError(f"output: {found.root} holds tokens of other shards; choose another folder or delete it")


class ViewDataset(Dataset):
    """All views of the images of some shards, in order."""

    def __init__(self, index: ShardIndex, numbers: list[int], crops: Crops, views: int, size: int, seed: int) -> None:
        self.reader = ShardReader(index)
        starts = [0, *self.reader.ends]
        self.samples = [sample for number in numbers for sample in range(starts[number], starts[number + 1])]
        self.crops, self.views, self.size, self.seed = crops, views, size, seed
        self.num_classes = len(index.classes) or None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict:
        sample = self.samples[position]
        shard, key, members = self.reader[sample]
        image = decode(members, shard, key)
        views = [transforms.to_tensor(self.view(image, sample, number)) for number in range(self.views)]
        label = read_label(members, shard, key, self.num_classes)
        return {"views": torch.stack(views), "label": label, "key": key}  # views: (views, 3, S, S) uint8

    def view(self, image: Image.Image, sample: int, number: int) -> Image.Image:
        if self.crops == "ten_crop":
            return transforms.ten_crop(image, self.size, number)
        if self.crops == "random":
            generator = sample_generator(self.seed, number, sample)
            return transforms.random_flip(transforms.random_crop(image, self.size, generator), generator)
        image = transforms.center_crop(image, self.size)
        return transforms.flip(image) if number == 1 else image


class ExtractData(L.LightningDataModule):
    """Gives each rank its part of the shards that are missing."""

    def __init__(
        self,
        index: ShardIndex,
        missing: list[int],
        crops: Crops,
        views: int,
        size: int,
        seed: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.index, self.missing = index, missing
        self.options = (crops, views, size, seed)
        self.batch_size, self.num_workers = batch_size, num_workers

    def numbers(self) -> list[int]:
        """Numbers of this rank's shards."""
        return self.missing[self.trainer.global_rank :: self.trainer.world_size]

    def predict_dataloader(self) -> DataLoader:
        """Whole shards, one after the other."""
        dataset = ViewDataset(self.index, self.numbers(), *self.options)
        return DataLoader(dataset, batch_size=self.batch_size, num_workers=self.num_workers)


class Extractor(L.LightningModule):
    """The tokenizer under Trainer.predict."""

    def __init__(self, tokenizer: torch.nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
        """(B, views, 3, S, S) uint8 -> (B, views, N) int64."""
        views = batch["views"]
        codes = self.tokenizer.tokenize(transforms.to_float(views.flatten(0, 1)))
        return codes.unflatten(0, views.shape[:2])


class ShardWriter(BasePredictionWriter):
    """Collects tokens until a shard is whole, then writes it."""

    def __init__(self, root: Path, index: ShardIndex, made_by: dict[str, Any], codebook_size: int) -> None:
        super().__init__(write_interval="batch")
        self.root, self.index, self.made_by = root, index, made_by
        self.dtype = np.uint16 if codebook_size <= 2**16 else np.uint32
        self.codes: list[np.ndarray] = []
        self.labels: list[int] = []
        self.keys: list[str] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Line up this rank's shards."""
        self.queue = [self.index.shards[number] for number in trainer.datamodule.numbers()]

    def write_on_batch_end(
        self, trainer, pl_module, prediction: Tensor, batch_indices, batch: dict, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Called by Lightning with the tokens (B, views, N) of a batch."""
        self.codes += list(prediction.cpu().numpy().astype(self.dtype))
        self.labels += batch["label"].tolist()
        self.keys += batch["key"]
        while self.queue and len(self.codes) >= (count := self.queue[0].samples):
            shard = self.queue.pop(0)
            codes, labels = np.stack(self.codes[:count]), np.array(self.labels[:count], np.int64)
            made_by = self.made_by | {"source": _source(shard)}
            write_codes(self.root / _name(shard), codes, labels, self.keys[:count], made_by)
            del self.codes[:count], self.labels[:count], self.keys[:count]
