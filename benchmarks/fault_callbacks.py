"""What benchmarks/faults.py puts into its training runs: a diary, and accidents."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Diary(Callback):
    """Writes a line after every batch to path.RANK: its number, the loss bit by bit, and a checksum of every sample."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        samples = batch["image"] if "image" in batch else batch["codes"]
        sums = [zlib.crc32(sample.numpy().tobytes()) for sample in samples]
        line = [trainer.fit_loop.epoch_loop.total_batch_idx, float(outputs["loss"]).hex(), batch["key"], sums]
        with open(f"{self.path}.{trainer.global_rank}", "a") as file:
            print(json.dumps(line), file=file)


torch_save = torch.save


def save_by_halves(what, file) -> None:
    """torch.save that puts the first half of a file on the disk before the second."""
    content = io.BytesIO()
    torch_save(what, content)
    half = len(content.getvalue()) // 2
    file.write(content.getvalue()[:half])
    file.flush()
    write_the_rest(file, content.getvalue()[half:])


def write_the_rest(file, content: bytes) -> None:
    """A point to be killed at."""
    file.write(content)


# Before which function's call: a hook of the callback itself, or one that saving a checkpoint calls.
POINTS = {
    "half_written": (sys.modules[__name__], "write_the_rest"),
    "validation": (Callback, "on_validation_batch_end"),
    "epoch_end": (Callback, "on_train_epoch_end"),
    "backward": (Callback, "on_before_backward"),
    "renaming": (os, "replace"),
    "step": (Callback, "on_before_optimizer_step"),
    "written": (os, "fsync"),
    "epoch_start": (Callback, "on_train_epoch_start"),
    "renamed": (Path, "unlink"),  # of the temporary name
}


class SignalAt(Callback):
    """The process of one rank sends itself a signal, at the first point of that kind after so many optimizer steps."""

    def __init__(self, point: str, step: int, name: str = "SIGKILL", rank: int = 0) -> None:
        self.point, self.step, self.name, self.rank = point, step, name, rank

    def setup(self, trainer, pl_module, stage) -> None:
        owner, function = POINTS[self.point]
        owner = self if owner is Callback else owner
        before = getattr(owner, function)

        def deadly(*arguments, **options):
            due = trainer.global_step >= self.step and trainer.global_rank == self.rank
            if due and self.name and not trainer.sanity_checking:
                name, self.name = self.name, ""
                os.kill(os.getpid(), signal.Signals[name])
            return before(*arguments, **options)

        setattr(owner, function, deadly)
        torch.save = save_by_halves if self.point == "half_written" else torch_save


class Poison(Callback):
    """Gradients of some batches become NaN on one rank, after they were averaged: only that rank can see it."""

    def __init__(self, batches: list[int], rank: int = 0) -> None:
        self.batches, self.rank = batches, rank

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self.batches and trainer.global_rank == self.rank:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(math.nan)


class Disk(Callback):
    """The small file system of a folder becomes full or read_only at one step, and is mended at another; 0 is never."""

    def __init__(self, folder: str, how: str, breaks: int, mended: int = 0) -> None:
        self.folder, self.how = Path(folder), how
        self.changes = {breaks: True} | ({mended: False} if mended else {})  # steps -> whether it is broken then

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step in self.changes:
            self.set(self.changes.pop(trainer.global_step))

    def set(self, broken: bool) -> None:
        """Break or mend it."""
        ballast = self.folder / "ballast"
        if self.how == "read_only":
            subprocess.run(["mount", "-o", f"remount,{'ro' if broken else 'rw'}", self.folder], check=True)
        elif broken:
            room = os.statvfs(self.folder)
            ballast.write_bytes(bytes(room.f_bavail * room.f_frsize))
        else:
            ballast.unlink()
