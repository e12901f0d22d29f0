"""Extraction of tokens for `dar extract`: the folder of token shards, and what fills it under Trainer.predict."""

import json
import signal
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from dar_lightning.data import transforms, workers
from dar_lightning.data.bad_samples import Bad, Skipped, check_share
from dar_lightning.data.classes import check_same_classes
from dar_lightning.data.loader import Loader
from dar_lightning.data.shards import INDEX, ShardIndex
from dar_lightning.data.token_dataset import CodesIndex, describe, read_header, write_codes
from dar_lightning.data.views import ViewBatches, Views
from dar_lightning.errors import UserError, begin_work
from dar_lightning.files import check_same, file_sha256, write_json
from dar_lightning.formats.text_encoder import TextEncoder
from dar_lightning.records.provenance import FILE, code_name, provenance
from dar_lightning.tokenizer.config import TokenizerConfig

STOP = "dar_extract_stop"  # in the process group's store: why all ranks must stop


@dataclass(frozen=True)
class TokenCache:
    """A folder of token shards, one per image shard, finished or not."""

    root: Path
    index: ShardIndex  # the image shards
    config: TokenizerConfig
    made_by: dict[str, Any]  # what the tokens depend on, beside their image shard
    unsaid: dict[str, Any]  # the same for token shards of versions that did not note all of it

    @cached_property
    def paths(self) -> list[Path]:
        """The token shard of each image shard."""
        return [self.root / Path(shard.name).with_suffix(".safetensors").name for shard in self.index.shards]

    def source(self, number: int) -> dict[str, Any]:
        """What identifies an image shard: its index entry, with the hash of its bytes."""
        shard = self.index.shards[number]
        path = self.index.root / shard.name
        if self.index.url is None and path.is_file() and (shard.sha256 is None or path.stat().st_size != shard.bytes):
            # also of a damaged file, so that one repaired since is another
            shard = replace(shard, sha256=file_sha256(path))
        return asdict(shard)

    def done(self) -> dict[int, list[str]]:
        """The image shards whose tokens are there -> the samples that were skipped in them.

        UserError if some are of another tokenizer or source, or of other options.
        """
        if (self.root / INDEX).exists():
            found = CodesIndex.load(self.root, "output", complete=False)
            if [shard.name for shard in found.shards] != [path.name for path in self.paths]:
                raise UserError(f"output: {self.root} holds tokens of other shards; choose another folder or delete it")
            named = {"shards": self.index.classes, "output": found.classes}
            check_same_classes(named, "choose another folder or delete this one")
        headers = {number: read_header(path) for number, path in enumerate(self.paths) if path.exists()}
        for number, header in headers.items():
            there = self.unsaid | header["made_by"]
            wanted = {"captioned": None, "encoder": None} | self.made_by  # which not all have
            check_same(f"{self.paths[number]} was made with", there, wanted | {"source": self.source(number)})
        return {number: header["skipped"] for number, header in headers.items()}

    def captions(self) -> list[list[str]]:
        """The captions of each image, in order; none for images without."""
        headers = map(read_header, self.paths)
        return [texts for header in headers for texts in header.get("captions", [[]] * header["samples"])]

    def finish(self, max_bad_share: float, encoder: str | None = None) -> CodesIndex:
        """Write the index, if all ranks together have not skipped too much."""
        for part in self.root.glob(".*.part"):  # of processes that were killed
            part.unlink(missing_ok=True)
        headers = [read_header(path) for path in self.paths]
        bad = tuple(name for header in headers for name in header["skipped"])
        check_share("shards", bad, self.index.num_samples, max_bad_share)  # each rank has met a part of them only
        captioned = [bool(texts) for texts in self.captions()]
        if 0 < sum(captioned) < len(captioned):
            missing = f"{len(captioned) - sum(captioned)} of {len(captioned)} images have no caption"
            print(f"shards: {missing}; the token shards count as without captions")
        made_by = self.made_by.get("encoder")
        codes = CodesIndex(
            root=self.root,
            labelled=self.index.labelled,
            captioned=bool(captioned) and all(captioned),
            encoder=made_by and {"name": encoder} | made_by,
            **{name: self.made_by[name] for name in ("tokenizer", "crops", "num_crops", "image_size")},
            tokenizer_config=self.config.to_dict(),
            num_tokens=self.config.num_tokens,
            codebook_size=self.config.codebook_size,
            classes=self.index.classes,
            shards=tuple(describe(path, header["samples"]) for path, header in zip(self.paths, headers, strict=True)),
            crop_names=tuple(self.made_by["crop_names"]),
            skipped=bad,
        )
        codes.save()
        return codes


class Extractor(L.LightningModule):
    """A tokenizer under Trainer.predict, its data, the missing image shards dealt to the ranks, and what writes tokens.

    The tokens of one shard are collected, then written; before the first one, what makes them is noted.
    """

    def __init__(
        self,
        tokenizer,
        cache: TokenCache,
        missing: list[int],
        views: Views,
        skipped: Skipped,
        batch_size,
        num_workers,
        encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.cache, self.missing, self.views, self.skipped = tokenizer, cache, missing, views, skipped
        self.batch_size, self.num_workers, self.encoder = batch_size, num_workers, encoder
        self._begin()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards than ranks

    def _begin(self) -> None:
        """Empty the lists of what was extracted from the shard that is being read."""
        self.codes, self.labels, self.keys, self.captions, self.bad = [], [], [], [], []

    def predict_dataloader(self) -> Loader:
        """This rank's shards, one after the other."""
        mine = self.missing[self.trainer.global_rank :: self.trainer.world_size]
        size, captioned = max(1, self.batch_size // len(self.views)), bool(self.cache.made_by.get("captioned"))
        batches = ViewBatches(self.cache.index, mine, self.views, size, captioned)
        return Loader(batches, batch_size=None, **workers.options(self.num_workers))

    def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
        """(B, V, 3, S, S) uint8 -> (B, V, N) int64."""
        views = batch["views"]
        parts = views.flatten(0, 1).split(self.batch_size)  # an image alone may have more views than that
        codes = torch.cat([self.tokenizer.tokenize(transforms.to_float(part)) for part in parts])
        return codes.unflatten(0, views.shape[:2])

    def setup(self, stage: str) -> None:
        """Add to the list of what made the shards; a line says so if other code made those that are there."""
        if not self.trainer.is_global_zero:
            return
        path, count = self.cache.root / FILE, len(self.cache.paths)
        listed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        before, done = listed[-1]["code"] if listed else None, count - len(self.missing)
        made = provenance(self.trainer.strategy.root_device, self.trainer.precision)
        if done and (before is None or before["sha256"] != made["code"]["sha256"]):
            names = f"{code_name(before)}, the others will be of {code_name(made['code'])}"
            print(f"{self.cache.root}: {done} of {count} token shards are of {names}", flush=True)
        if made not in listed[-1:]:
            write_json(path, [*listed, made])

    def on_predict_start(self) -> None:
        begin_work()

    def on_predict_batch_end(self, outputs: Tensor, batch: dict, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called by Lightning with the tokens (B, V, N) of a batch."""
        if self.trainer.received_sigterm:  # Lightning stops for it in training only
            raise SystemExit(128 + signal.SIGTERM)
        if self.trainer.world_size > 1 and _get_default_store().check([STOP]):
            raise UserError(_get_default_store().get(STOP).decode())
        cache, number = self.cache, batch["shard"]
        codes = outputs.cpu().numpy().astype(np.uint16 if cache.config.codebook_size <= 2**16 else np.uint32)
        for row, flaw in enumerate(map(Bad, *batch["flaw"])):
            if flaw.reason:
                self.skipped.add([flaw])
                self.skipped.check()
                self.bad.append(str(flaw))
            else:
                self.codes.append(codes[row])
                self.labels.append(int(batch["label"][row]))
                self.keys.append(batch["key"][row])
                self.captions.append(json.loads(batch["captions"][row]))
        if batch["last"]:
            made_by = cache.made_by | {"tokenizer_config": cache.config.to_dict(), "source": cache.source(number)}
            codes = np.stack(self.codes) if self.codes else codes[:0]
            features = None
            if self.encoder is not None:
                features = self.encoder([text for texts in self.captions for text in texts], self.batch_size)
            labels, captions = np.array(self.labels, np.int64), self.captions if any(self.captions) else None
            write_codes(cache.paths[number], codes, labels, self.keys, made_by, self.bad, captions, features)
            self._begin()


def predict_until_all_are_done(trainer: L.Trainer, module: Extractor) -> None:
    """Every rank's shards; the first rank with a UserError stops the others, and rank 0 raises it."""
    mistake = None
    try:
        trainer.predict(module, return_predictions=False)
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
        if mistake := next(filter(None, mistakes), None):
            # rank 0 reports it; Lightning kills it once another rank has left with an error
            raise UserError(mistake) if trainer.is_global_zero else SystemExit(0)
