"""What benchmarks/faults.py puts into its training runs: a diary, and accidents."""

import io
import json
import math
import os
import signal
import subprocess
import zlib
from pathlib import Path

import torch
from lightning.pytorch import Callback

from dar_lightning.training import checkpoint_io


class Diary(Callback):
    """Writes a line after every batch: its number, the loss bit by bit, and a checksum of every sample.

    Args:
        path: the file; the rank is appended to its name.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        samples = batch["image"] if "image" in batch else batch["codes"]
        sums = [zlib.crc32(sample.numpy().tobytes()) for sample in samples]
        line = [trainer.fit_loop.epoch_loop.total_batch_idx, float(outputs["loss"]).hex(), batch["key"], sums]
        with open(f"{self.path}.{trainer.global_rank}", "a") as file:
            print(json.dumps(line), file=file)


HOOKS = {
    "backward": "on_before_backward",
    "step": "on_before_optimizer_step",
    "validation": "on_validation_batch_end",
    "epoch_end": "on_train_epoch_end",
    "epoch_start": "on_train_epoch_start",
}


class SignalAt(Callback):
    """The process sends itself a signal, at an exact point of the run.

    Args:
        point: backward, step (before the optimizer), validation (after a batch of it), epoch_end, epoch_start, or
            inside of saving a checkpoint: half_written, written, renaming, renamed.
        step: optimizer steps done by then; the first such point at or after them.
        name: the signal's.
        rank: only there.
    """

    def __init__(self, point: str, step: int, name: str = "SIGKILL", rank: int = 0) -> None:
        self.point, self.step, self.name, self.rank = point, step, name, rank
        self.sent = False

    def _now(self, trainer, point: str) -> None:
        here = point == self.point and trainer.global_step >= self.step and trainer.global_rank == self.rank
        if here and not self.sent and not trainer.sanity_checking:
            self.sent = True
            os.kill(os.getpid(), signal.Signals[self.name])

    def setup(self, trainer, pl_module, stage) -> None:
        if self.point in HOOKS:
            setattr(self, HOOKS[self.point], lambda trainer, *_: self._now(trainer, self.point))

    def on_train_start(self, trainer, pl_module) -> None:
        real_save, real_fsync, real_replace = torch.save, os.fsync, os.replace

        def save(what, file) -> None:
            content = io.BytesIO()
            real_save(what, content)
            half = len(content.getvalue()) // 2
            file.write(content.getvalue()[:half])
            file.flush()
            self._now(trainer, "half_written")
            file.write(content.getvalue()[half:])

        def fsync(number) -> None:
            self._now(trainer, "written")
            real_fsync(number)

        def replace(source, target) -> None:
            self._now(trainer, "renaming")
            real_replace(source, target)
            self._now(trainer, "renamed")

        if self.point in ("half_written", "written", "renaming", "renamed"):
            checkpoint_io.torch.save, os.fsync, os.replace = save, fsync, replace


class Poison(Callback):
    """Gradients become NaN on one rank, after they were averaged: only that rank can see it.

    Args:
        batches: numbers of the batches.
        rank: the one.
    """

    def __init__(self, batches: list[int], rank: int = 0) -> None:
        self.batches, self.rank = batches, rank

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self.batches and trainer.global_rank == self.rank:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(math.nan)


class Disk(Callback):
    """The disk of the run breaks at one step and is mended at another.

    Args:
        folder: where a small file system is mounted.
        how: full or read_only.
        breaks: optimizer steps done when it breaks.
        mended: optimizer steps done when it is mended; 0 for never.
    """

    def __init__(self, folder: str, how: str, breaks: int, mended: int = 0) -> None:
        self.folder, self.how, self.breaks, self.mended = Path(folder), how, breaks, mended
        self.broken = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.breaks and not self.broken:
            self.set(broken=True)
        elif trainer.global_step == self.mended and self.broken:
            self.set(broken=False)

    def set(self, broken: bool) -> None:
        """Break or mend it."""
        self.broken = broken
        ballast = self.folder / "ballast"
        if self.how == "read_only":
            subprocess.run(["mount", "-o", f"remount,{'ro' if broken else 'rw'}", self.folder], check=True)
        elif broken:
            room = os.statvfs(self.folder)
            ballast.write_bytes(bytes(room.f_bavail * room.f_frsize))
        else:
            ballast.unlink()
