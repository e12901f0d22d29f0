"""SampleWriter: drawn images into one npz, by any number of processes, which may be killed and started again."""

import glob
import hashlib
import json
import shutil
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from dar_lightning.ar.decode_road import choose_road
from dar_lightning.ar.guidance import guidance_combine
from dar_lightning.errors import UserError, require
from dar_lightning.files import atomic_path, check_local, check_same, read_json, write_json, write_text
from dar_lightning.generation.labels import LabelsDataModule
from dar_lightning.generation.npz import write_npz
from dar_lightning.records.drawn import NAMES, write_drawn
from dar_lightning.records.provenance import provenance

FREE = ("pipeline", "ema")  # the same images may be drawn from a folder that has moved, or that now says more


class SampleWriter(BasePredictionWriter):
    """Writes `NAME.npz` (`arr_0` uint8 (n, H, W, 3), and `labels` of classes) and beside it `NAME.json`, the protocol.

    Until all are drawn, the pieces of `data.LabelsDataModule` lie in `NAME.parts/`, each written whole or not at all,
    with the settings they were drawn with. The same command, started again, draws what is missing; with other settings
    it is refused. A piece is in memory at a time, however many there are. The protocol lists what drew pieces:
    every code, device and command.

    Args:
        output: the .npz file.
    """

    def __init__(self, output: str) -> None:
        super().__init__(write_interval="batch")
        check_local(output, "output")
        self.path = Path(output)
        require(self.path.suffix == ".npz", f"output is {output}: give the name of an .npz file")
        self.protocol_path, self.parts = self.path.with_suffix(".json"), self.path.with_suffix(".parts")
        self.settings_path = self.parts / "settings.json"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.data = trainer.datamodule
        if not isinstance(self.data, LabelsDataModule):
            raise UserError("SampleWriter writes what GenerationModule draws for a LabelsDataModule: give it as data")
        trainer.predict_loop.return_predictions = False  # Lightning would keep all images
        settings = pl_module.protocol | self.data.protocol | {"piece_size": self.data.piece_size}
        self.classed = pl_module.pipeline.ar.condition.takes == "labels"
        settings |= {} if self.classed else {"classes": "none: no condition"}
        settings |= {"device": trainer.strategy.root_device.type, "precision": trainer.precision}
        settings["float32_matmul_precision"] = torch.get_float32_matmul_precision()
        self.settings = json.loads(json.dumps(settings))  # as it is read again: tuples are lists
        self.shape = (self.data.count, settings["image_size"], settings["image_size"], 3)
        mistake, missing = None, []
        if trainer.is_global_zero:
            try:
                missing = self._find_missing()
            except UserError as error:
                mistake = error
        # Ranks that looked for themselves could see each other's first pieces.
        mistake, self.data.missing = trainer.strategy.broadcast((mistake, missing))
        if mistake is not None:
            # Lightning kills rank 0, which is to report it, once another rank has left with an error
            raise mistake if trainer.is_global_zero else SystemExit(0)

    def _find_missing(self) -> list[range]:
        """The pieces to draw; UserError if what is there already was drawn with other settings."""
        self.done = self.path.exists() and self.protocol_path.is_file()  # the protocol is written last
        there = self.protocol_path if self.done else self.settings_path
        if not there.is_file():
            if self.path.exists():
                name = self.protocol_path.name
                raise UserError(f"output: {self.path} is there, without its {name}; delete it or rename")
            return self.data.pieces
        settings = {name: ours for name, ours in self.settings.items() if name not in FREE}
        hint = f"choose another file or delete {self.path if self.done else self.parts}"
        check_same(f"{there} tells of images with", read_json(there), settings, hint)
        return [] if self.done else [piece for piece in self.data.pieces if not self._is_whole(piece)]

    def _file(self, piece: range) -> Path:
        return self.parts / f"{piece.start:07d}.npy"

    def _is_whole(self, piece: range) -> bool:
        try:
            return np.load(self._file(piece), mmap_mode="r").shape == (len(piece), *self.shape[1:])
        except (FileNotFoundError, ValueError, EOFError):  # missing, cut, empty
            return False

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what draws, once the Trainer has cast the weights."""
        dtypes = {*pl_module.pipeline.dtypes.values()} - {"float32"}
        weights = f", weights in {' and '.join(sorted(dtypes))}" if dtypes else ""
        made = provenance(trainer.strategy.root_device, f"{trainer.precision}{weights}")
        calls = False if guidance_combine(pl_module.options["guidance"]) else None
        decoding = "Jacobi" if "jacobi" in pl_module.options else choose_road(pl_module.pipeline.ar, calls)
        self.made = json.dumps(made | {"decoding": decoding}) + "\n"

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        _: Any,
        batch: dict[str, Tensor],
        *__: Any,
    ) -> None:
        """Called by Lightning with images (B, 3, H, W) and their numbers; a rank draws its numbers in order."""
        images = prediction.permute(0, 2, 3, 1).cpu().numpy()
        for number, image in zip(batch["index"].tolist(), images, strict=True):
            piece = self.data.pieces[number // self.data.piece_size]
            if number == piece.start:
                self.images = np.empty((len(piece), *self.shape[1:]), np.uint8)
            self.images[number - piece.start] = image
            if number == piece[-1]:
                self._save(piece)
        if trainer.received_sigterm:  # Lightning stops for it in training only
            raise SystemExit(128 + signal.SIGTERM)

    def _save(self, piece: range) -> None:
        # Not before: settings that no image can be drawn with would stand in the way of the right ones.
        if not self.settings_path.is_file():
            write_json(self.settings_path, self.settings)
        # Provenance, a file for each kind of process, so that ranks need not agree who writes.
        made = self.parts / f"drawn_by-{hashlib.sha256(self.made.encode()).hexdigest()[:12]}.json"
        if not made.is_file():
            write_text(made, self.made)
        with atomic_path(self._file(piece)) as part, open(part, "wb") as file:
            np.save(file, self.images)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the other ranks, which Lightning would leave running."""
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the pieces when all ranks have drawn theirs. Lightning calls this also if none was missing."""
        if trainer.world_size > 1:
            # Lightning's barrier gives up after 30 minutes; a rank without a piece waits for as long as one takes
            patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
            torch.distributed.barrier(patient)
        if not trainer.is_global_zero:
            return
        if not self.done:
            missing = sum(not self._is_whole(piece) for piece in self.data.pieces)
            if missing:  # the Trainer was told to stop early
                print(f"{self.path}: {missing} of {len(self.data.pieces)} pieces are missing; the same command goes on")
                return
            for name in (self.path.name, self.protocol_path.name):
                for part in self.path.parent.glob(f".{glob.escape(name)}.*.part"):  # of processes that were killed
                    part.unlink()
            pieces = (np.load(self._file(piece)) for piece in self.data.pieces)
            labels = self.data.labels.numpy() if self.classed else None
            digest = write_npz(self.path, pieces, self.shape, labels)
            runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.parts.glob("drawn_by-*.json"))]
            about = {NAMES: list(pl_module.pipeline.classes), "provenance": runs}
            write_drawn(self.path, self.settings | about, digest)
        if self.parts.is_dir():
            shutil.rmtree(self.parts)
        print(f"{self.path}: {self.data.count} images; how they were drawn is in {self.protocol_path.name}")
