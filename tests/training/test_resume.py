"""A run that died and was started again with the same command ends with the bits of one that did not; and checkpoints.

Steps are of two batches, so that a checkpoint may fall between them.
"""

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from refusals import refusal, refused
from tiny_models import fit_ar, fit_tokenizer, options

from dar_lightning import files
from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.training.checkpoint_io import SafeCheckpointIO
from dar_lightning.training.loggers import SurvivingWriter
from dar_lightning.weights.lightning import load_lightning_checkpoint

STEPS = 14
CALLBACKS = "--trainer.callbacks+=dar_lightning.training.callbacks"
ADVERSARIAL = "--model.init_args.adversarial=dar_lightning.training.losses.AdversarialLoss"


class Killed(Exception):
    """What nobody catches."""


class Dies(Callback):
    """Ends the process in the middle of a step, or between its batches, if wanted right after a checkpoint there."""

    def __init__(self, step: int | None = None, batches: int | None = None, saves: bool = False):
        self.step, self.batches, self.saves = step, batches, saves

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            self.die(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            self.die(trainer)

    def die(self, trainer):
        if self.saves:
            trainer.save_checkpoint(trainer.checkpoint_callback.dirpath + "/last.ckpt")
        raise Killed


def run(part: str, data: tuple[str, str], folder: Path, every: int = STEPS, **dies) -> dict:
    """Train with a checkpoint every so many steps; returns the newest, which is what `ckpt_path: last` means too."""
    fit = fit_tokenizer if part == "tokenizer" else fit_ar
    words = [
        *fit(*data, folder, max_steps=STEPS, limit_val_batches=1, val_check_interval=6),
        *("--data.init_args.batch_size=2", "--global_batch=4", "--ckpt_path=last"),
        *options("model.init_args.optimizer", dict(lr=0.01, weight_decay=0.1, warmup_steps=3, decay_steps=6)),
        *("--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.every_n_train_steps={every}"),
        *("--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=0"),
        *(f"{CALLBACKS}.EMA", "--trainer.callbacks.decay=0.7", "--trainer.callbacks.update_starting_at_step=3"),
    ]
    if part == "tokenizer":
        warmup = dict(warmup_steps=5, collect_steps=4, revive_every=3, revive_until=12)
        words += [f"{CALLBACKS}.CodebookWarmup", *options("trainer.callbacks", warmup)]
        words += [ADVERSARIAL, *options("model.init_args.adversarial", dict(start_step=2, channels=4, depth=2))]
    if dies:
        words += [f"--trainer.callbacks+={__name__}.Dies", *options("trainer.callbacks", dies)]
        with pytest.raises(Killed):
            main([str(word) for word in words])
    else:
        main([str(word) for word in words])
    return torch.load(max((folder / "checkpoints").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime_ns))


def differences(one, other, where: str = "") -> list[str]:
    """Places where two nested structures are not the same, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [where]
    if isinstance(one, dict | list | tuple):
        if type(one) is not type(other) or len(one) != len(other):
            return [where]
        keys = one if isinstance(one, dict) else range(len(one))
        return [place for key in keys for place in differences(one[key], other[key], f"{where}/{key}")]
    return [] if one == other else [where]


@pytest.fixture(scope="module")
def data(images, tokens) -> dict[str, tuple[str, str]]:
    return {"tokenizer": images, "ar": tokens}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, Path]:
    """Folders of the runs that did not die."""
    folders = {part: tmp_path_factory.mktemp(part) for part in data}
    for part, folder in folders.items():
        run(part, data[part], folder)
    return folders


# The codebook starts from k-means after step 5 and is revived after 8 and 11: checkpoints right after k-means, in the
# middle of collecting latents and in the middle of counting uses, the last two between a step's batches (2k + 1 are the
# first half of step k; 15 is of the second epoch). The last one is what Lightning's save_on_exception writes.
@pytest.mark.parametrize(
    ("part", "every", "dies", "saved"),
    [
        ("tokenizer", 5, dict(step=6), 5),
        ("tokenizer", STEPS, dict(batches=7, saves=True), 3),
        ("tokenizer", STEPS, dict(batches=15, saves=True), 7),
        ("ar", STEPS, dict(step=4, saves=True), 4),
    ],
    ids=str,
)
def test_a_killed_training_goes_on(data, whole, tmp_path, part, every, dies, saved):
    assert run(part, data[part], tmp_path, every, **dies)["global_step"] == saved
    found, expected = run(part, data[part], tmp_path), torch.load(whole[part] / "checkpoints" / "last.ckpt")
    assert expected["global_step"] == STEPS
    assert ("adversarial.discriminator.0.weight" in expected["state_dict"]) == (part == "tokenizer")
    for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "averaging_state"):
        assert differences(expected[key], found[key], key) == []
    warm = [key for key in expected["callbacks"] if "CodebookWarmup" in key]
    assert differences([expected["callbacks"][key] for key in warm], [found["callbacks"][key] for key in warm]) == []


def test_what_a_checkpoint_does_not_fit_is_refused(data, whole, tmp_path, capsys):
    """Another number of batches a step; a module without the discriminator, whose tokenizer is exported alone."""
    file = whole["tokenizer"] / "checkpoints" / "last.ckpt"
    assert not any("discriminator" in name for name in load_lightning_checkpoint(file).state_dict())
    words = [*fit_tokenizer(*data["tokenizer"], tmp_path, limit_val_batches=0), f"--ckpt_path={file}"]
    three = ["--data.init_args.batch_size=2", "--global_batch=6", ADVERSARIAL]
    three += options("model.init_args.adversarial", dict(channels=4, depth=2))
    for more, line in (
        (["--global_batch=4"], "adversarial is null and the checkpoint has a discriminator"),
        (three, "number of batches per optimizer step was 2 in the checkpoint and is 3 now"),
    ):
        assert line in refusal(capsys, [*words, *more])


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
