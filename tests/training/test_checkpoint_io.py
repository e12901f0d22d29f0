"""Checkpoints are written whole or not at all, and a run that cannot write one says so."""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from refusals import refusal, refused
from tiny_models import fit_ar

from dar_lightning import files
from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.training.checkpoint_io import SafeCheckpointIO
from dar_lightning.training.loggers import SurvivingWriter


@pytest.fixture
def checkpoint_io() -> SafeCheckpointIO:
    """Of a module that is not ours."""
    return SafeCheckpointIO(BoringModel())


def test_a_full_disk_leaves_what_was_there(checkpoint_io, tmp_path):
    """The kernel's limit on the size of a file stands for the full disk: an error in the middle of writing."""
    path = tmp_path / "last.ckpt"
    checkpoint_io.save_checkpoint({"step": 1, "weights": torch.zeros(10**5)}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    try:
        with pytest.raises(UserError, match=f"^cannot write {path}: File too large$"):
            checkpoint_io.save_checkpoint({"step": 2, "weights": torch.zeros(10**5)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint_io.load_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_file_and_folder_are_on_the_disk_before_and_after_the_renaming(tmp_path, monkeypatch):
    events, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(number: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real_fsync(number)

    def replace(source, target) -> None:
        events.append("renamed")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with files.atomic_path(tmp_path / "x") as part:
        part.write_text("new")
        events.append("written")
    assert events == ["written", part.name, "renamed", tmp_path.name]


def test_a_broken_checkpoint_is_refused_and_the_one_before_named(checkpoint_io, tmp_path):
    older, path = tmp_path / "step=3.ckpt", tmp_path / "last.ckpt"
    for file in (older, path):
        checkpoint_io.save_checkpoint({"weights": torch.zeros(1000)}, file)
    os.truncate(path, path.stat().st_size // 2)
    says = f"^cannot read {path}: [^;]*"
    refused(f"{says}; the next older checkpoint is {older}, for --ckpt_path$", checkpoint_io.load_checkpoint, path)
    older.unlink()
    refused(f"{says}$", checkpoint_io.load_checkpoint, path)


def command(tokens, folder: Path, *options: str, **trainer) -> list[str]:
    checkpoint = "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint"
    words = [*fit_ar(*tokens, folder, limit_val_batches=0, **trainer), checkpoint, "--ckpt_path=last", *options]
    return [str(word) for word in words]


def test_the_folder_of_a_run(tokens, tmp_path, capsys):
    """What a killed run left half written is removed; a folder that cannot be one is found before the first step."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".last.ckpt.1234.part").write_bytes(b"half")
    (folder / "notes.part").write_text("mine")
    main(command(tokens, tmp_path, max_steps=1))
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".ckpt") == ["notes.part"]
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    said = refusal(capsys, command(tokens, tmp_path, max_steps=1))
    assert said == f"dar fit: cannot write checkpoints to {folder}: File exists"


def test_no_checkpoint_in_the_middle_of_accumulation(tokens, tmp_path, monkeypatch):
    """Resumed at step 2, the first of two batches ends with step 2, too: Lightning would save it there."""
    options = ["--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.save_top_k=0"]
    saved, save = [], SafeCheckpointIO.save_checkpoint

    def noted(self, checkpoint, path, **options):
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        saved.append((checkpoint["global_step"], batches))
        save(self, checkpoint, path, **options)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", noted)
    for steps in (2, 6):
        main(command(tokens, tmp_path, *options, max_steps=steps, accumulate_grad_batches=2))
    assert saved == [(2, 4), (4, 8), (6, 12)]  # an epoch of 5 batches has 2 whole steps


class Writer:
    """An EventFileWriter whose disk is full."""

    def get_logdir(self) -> str:
        return "logs"

    def add_event(self, event) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_logs_that_cannot_be_written_cost_a_line(monkeypatch, capsys):
    writer = SurvivingWriter(Writer())
    for _ in range(3):
        writer.add_event("lost")
    reason = "cannot write logs to logs: No space left on device"
    assert capsys.readouterr().err == f"WARNING: {reason}; nothing is logged for a minute, training goes on\n"
    written = []

    class Mended:
        def __init__(self, folder: str) -> None:
            assert folder == "logs"
            self.add_event = written.append

    monkeypatch.setattr("dar_lightning.training.loggers.EventFileWriter", Mended)
    monkeypatch.setattr("dar_lightning.training.loggers.monotonic", lambda: writer._retry_at + 1)
    writer.add_event("kept")
    assert written == ["kept"]
