"""`dar extract`: run a tokenizer over image shards, once, and keep the tokens."""

import json
import signal
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from dar_lightning.data import transforms, workers
from dar_lightning.data.bad_samples import Bad, Skipped, check_share
from dar_lightning.data.loader import Loader
from dar_lightning.data.shards import INDEX, Shard, ShardIndex
from dar_lightning.data.token_dataset import CodesIndex, describe, read_header, write_codes
from dar_lightning.data.views import Crops, ViewBatches, Views
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256, locked, users_path, write_text
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.records.provenance import FILE, code_name, provenance
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

STOP = "dar_extract_stop"  # in the process group's store: why all ranks must stop


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
    cache_dir: str | None = None,
    max_bad_share: float = 0.01,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
) -> None:
    """Tokenize image shards into token shards for CodesDataModule.

    One file is written per image shard, whole or not at all, and the index last: a run that was interrupted goes on
    with the shards that are missing, and a finished one is left alone. With several devices, each takes a part of the
    shards, and the files are the same. Only `provenance.json`, which lists what made them, differs. A sample that
    cannot be used is left out, and named in the header of the token shard and in the index.

    Args:
        tokenizer: Folder of a tokenizer (config.json, model.safetensors) or its Hugging Face repository.
        shards: Image shards: a folder, one tar, or a brace pattern; or the URL of a folder with an index, or of a
            pattern.
        output: Folder for the token shards.
        crops: Views of each image: `center` (1), `center_flip` (2: as it is and mirrored), `ten_crop` (10: LlamaGen's,
            from 1.1 times the size), `random` (ADM random crops and flips).
        random_crops: Number of views for `random`.
        image_size: Side of the crops in pixels; the tokenizer's own when left out.
        batch_size: Crops per forward pass and device.
        num_workers: Worker processes that decode and crop.
        seed: Of the random crops.
        cache_dir: Folder for copies of remote shards.
        max_bad_share: Largest share of the samples that may be bad.
        accelerator: Lightning's: `auto`, `cpu`, `gpu`, ...
        devices: Lightning's: number of devices, or `auto`.
        precision: Lightning's, for weights in float32, however they are stored; the search for the nearest code is
            always in float32. Lower precision changes a few tokens.

    Raises:
        UserError: The tokenizer or the shards cannot be read, too many samples are bad, or `output` holds something
            else.
    """
    for name, value in (("random_crops", random_crops), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: {value} is not a number of crops, give at least 1")
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size: {image_size} is not a number of pixels, give at least 1")
    if num_workers < 0:
        raise UserError(f"num_workers: {num_workers} is negative, give 0 or more")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share: {max_bad_share} is not a share, give 0 to 1")
    index = ShardIndex.load(shards, "shards", cache_dir)
    model = SequentialDiffusionTokenizer.from_pretrained(tokenizer).float()  # weights that are stored in bfloat16, too
    views = Views(crops, random_crops, image_size or model.config.image_size, seed)
    made_by = {
        "tokenizer": model_sha256(model),
        "crops": crops,
        "num_crops": len(views),
        "crop_names": views.names,
        "image_size": views.size,
        "seed": seed if crops == "random" else None,
        "precision": precision,
    }
    root = Path(output)
    if (root / INDEX).exists():
        _refuse_others(CodesIndex.load(root, "output", complete=False), made_by, index)
    done = [number for number in range(len(index.shards)) if _is_done(root, index, number, made_by)]
    missing = sorted({*range(len(index.shards))} - {*done})
    if not missing and (root / INDEX).exists():
        found = CodesIndex.load(root, "output")
        print(f"{output} is complete: {found.num_samples} images x {len(views)} crops x {found.num_tokens} tokens")
        return
    with users_path("output"):
        root.mkdir(parents=True, exist_ok=True)

    skipped = Skipped("shards", index.num_samples, max_bad_share)
    skipped.add(index.lost)
    for number in done:
        lines = read_header(root / _name(index.shards[number]))["skipped"]
        skipped.add(Bad(*line.partition(": ")[::2]) for line in lines)
    skipped.check()
    about = made_by | {"tokenizer_config": model.config.to_dict()}
    try:
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # ExtractData gives every rank whole shards
            callbacks=[ShardWriter(root, index, about, model.config.codebook_size, skipped)],
        )
    except MisconfigurationException as error:
        raise UserError(f"accelerator {accelerator}, devices {devices}: {' '.join(str(error).split())}") from error
    with locked(root, "output") if trainer.is_global_zero else nullcontext():
        if missing:
            _predict(trainer, Extractor(model, batch_size), ExtractData(index, missing, views, batch_size, num_workers))
        if trainer.is_global_zero:
            _finish(root, index, about, model.config.num_tokens, model.config.codebook_size, max_bad_share)


def _predict(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> None:
    """Every rank's shards, until all ranks are done.

    Raises:
        UserError: Too many samples of one rank are bad; on rank 0, whichever rank it was.
        SystemExit: The same on the other ranks.
    """
    mistake = None
    try:
        trainer.predict(module, datamodule=data, return_predictions=False)
    except UserError as error:
        if trainer.world_size == 1:
            raise
        mistake = str(error)
        _get_default_store().set(STOP, mistake)
    except BaseException:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)  # the other ranks, which Lightning would leave running
        raise
    if trainer.world_size > 1:
        # Lightning's barrier gives up after 30 minutes, and a rank without a shard waits for as long as one takes
        patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
        mistakes = [None] * trainer.world_size
        torch.distributed.all_gather_object(mistakes, mistake, group=patient)
        mistake = next(filter(None, mistakes), None)
        if mistake and not trainer.is_global_zero:
            raise SystemExit(0)  # rank 0 reports it; Lightning kills it once another rank has left with an error
        if mistake:
            raise UserError(mistake)


def _finish(
    root: Path, index: ShardIndex, about: dict[str, Any], num_tokens: int, codebook_size: int, max_bad_share: float
) -> None:
    """Write the index, if all ranks together did not skip too much."""
    for part in root.glob(".*.part"):  # of processes that were killed
        part.unlink(missing_ok=True)
    paths = [root / _name(shard) for shard in index.shards]
    headers = [read_header(path) for path in paths]
    bad = tuple(name for header in headers for name in header["skipped"])
    check_share("shards", bad, index.num_samples, max_bad_share)  # each rank has met a part of them only
    codes = CodesIndex(
        root=root,
        **{name: about[name] for name in ("tokenizer", "tokenizer_config", "crops", "num_crops", "image_size")},
        num_tokens=num_tokens,
        codebook_size=codebook_size,
        classes=index.classes,
        shards=tuple(describe(path, header["samples"]) for path, header in zip(paths, headers, strict=True)),
        crop_names=tuple(about["crop_names"]),
        skipped=bad,
    )
    codes.save()
    total = sum(entry.bytes for entry in codes.shards) / 1e6
    print(f"{codes.num_samples} images x {codes.num_crops} crops x {num_tokens} tokens, {total:.1f} MB: {root}")
    if codes.skipped:
        print(f"{len(codes.skipped)} of {index.num_samples} samples were skipped, {root / INDEX} names them")


def _name(shard: Shard) -> str:
    return Path(shard.name).with_suffix(".safetensors").name


def _is_done(root: Path, index: ShardIndex, number: int, made_by: dict[str, Any]) -> bool:
    """Whether a token shard is there already; one of another tokenizer, source or other crops is refused."""
    path = root / _name(index.shards[number])
    if not path.exists():
        return False
    header = read_header(path)
    expected = made_by | {"source": _source(index, number)}
    for name, value in expected.items():
        if header["made_by"].get(name) != value:
            raise UserError(
                f"output: {path} was made with {name} {header['made_by'].get(name)}, now it is {value}; "
                "choose another folder or delete this one"
            )
    return True


def _source(index: ShardIndex, number: int) -> dict[str, Any]:
    """What identifies an image shard: its index entry, with the hash of its bytes."""
    shard = index.shards[number]
    path = index.root / shard.name
    if index.url is None and path.is_file() and (shard.sha256 is None or path.stat().st_size != shard.bytes):
        # also of a damaged file, so that one repaired since is another
        shard = replace(shard, sha256=file_sha256(path))
    return asdict(shard)


def _refuse_others(found: CodesIndex, made_by: dict[str, Any], index: ShardIndex) -> None:
    names, wanted = [shard.name for shard in found.shards], [_name(shard) for shard in index.shards]
    if found.tokenizer != made_by["tokenizer"]:
        raise UserError(
            f"output: {found.root} holds tokens of tokenizer {found.tokenizer[:12]}, this one is "
            f"{made_by['tokenizer'][:12]}; choose another folder or delete it"
        )
    if names != wanted:
        raise UserError(f"output: {found.root} holds tokens of other shards; choose another folder or delete it")


class ExtractData(L.LightningDataModule):
    """Gives each rank its part of the shards that are missing."""

    def __init__(self, index: ShardIndex, missing: list[int], views: Views, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.index, self.missing, self.views = index, missing, views
        self.images, self.num_workers = max(1, batch_size // len(views)), num_workers
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards than ranks

    def predict_dataloader(self) -> Loader:
        """Whole shards, one after the other."""
        mine = self.missing[self.trainer.global_rank :: self.trainer.world_size]
        batches = ViewBatches(self.index, mine, self.views, self.images)
        return Loader(batches, batch_size=None, **workers.options(self.num_workers))


class Extractor(L.LightningModule):
    """The tokenizer under Trainer.predict."""

    def __init__(self, tokenizer: torch.nn.Module, batch_size: int) -> None:
        super().__init__()
        self.tokenizer, self.batch_size = tokenizer, batch_size

    def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
        """(B, V, 3, S, S) uint8 -> (B, V, N) int64."""
        views = batch["views"]
        parts = views.flatten(0, 1).split(self.batch_size)  # an image alone may have more views than that
        codes = torch.cat([self.tokenizer.tokenize(transforms.to_float(part)) for part in parts])
        return codes.unflatten(0, views.shape[:2])


class ShardWriter(L.Callback):
    """Collects the tokens of one shard, then writes it; first of all, notes what makes the shards."""

    def __init__(
        self, root: Path, index: ShardIndex, about: dict[str, Any], codebook_size: int, skipped: Skipped
    ) -> None:
        self.root, self.index, self.about, self.skipped = root, index, about, skipped
        self.dtype = np.uint16 if codebook_size <= 2**16 else np.uint32
        self._start()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Adds to the list of what made the shards; a line says so if other code made those that are there."""
        if not trainer.is_global_zero:
            return
        path, done = self.root / FILE, len(self.index.shards) - len(trainer.datamodule.missing)
        listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        before = listed[-1]["code"] if listed else None
        made = provenance(trainer.strategy.root_device, trainer.precision)
        if done and (before is None or before["sha256"] != made["code"]["sha256"]):
            names = f"{code_name(before)}, the others will be of {code_name(made['code'])}"
            print(f"{self.root}: {done} of {len(self.index.shards)} token shards are of {names}", flush=True)
        if made not in listed[-1:]:
            write_text(path, json.dumps([*listed, made], indent=2) + "\n")

    def _start(self) -> None:
        self.codes: list[np.ndarray] = []  # of (V, N)
        self.labels: list[int] = []
        self.keys: list[str] = []
        self.bad: list[str] = []

    def on_predict_batch_end(self, trainer, pl_module, outputs: Tensor, batch: dict, batch_idx, dataloader_idx=0):
        """Called by Lightning with the tokens (B, V, N) of a batch."""
        if trainer.received_sigterm:  # Lightning stops for it in training only
            raise SystemExit(128 + signal.SIGTERM)
        if trainer.world_size > 1 and _get_default_store().check([STOP]):
            raise UserError(_get_default_store().get(STOP).decode())
        for codes, label, key, flaw in zip(
            outputs.cpu().numpy().astype(self.dtype),
            batch["label"].tolist(),
            batch["key"],
            map(Bad, *batch["flaw"]),
            strict=True,
        ):
            if flaw.reason:
                self.skipped.add([flaw])
                self.skipped.check()
                self.bad.append(str(flaw))
            else:
                self.codes.append(codes)
                self.labels.append(label)
                self.keys.append(key)
        if batch["last"]:
            number = batch["shard"]
            codes = np.stack(self.codes) if self.codes else np.empty((0, *outputs.shape[1:]), self.dtype)
            made_by = self.about | {"source": _source(self.index, number)}
            path = self.root / _name(self.index.shards[number])
            write_codes(path, codes, np.array(self.labels, np.int64), self.keys, made_by, self.bad)
            self._start()
