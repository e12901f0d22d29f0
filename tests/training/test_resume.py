"""A run that died and was started again with the same command ends with the bits of one that did not."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import fit_ar, fit_tokenizer

from dar_lightning.cli import main

STEPS = 14


class Killed(Exception):
    """What nobody catches."""


class DieAt(Callback):
    """The process ends in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            raise Killed


def run(command: list, every: int, die_at: int | None = None) -> None:
    callbacks = [
        *("--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.every_n_train_steps={every}"),
        *("--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=0"),
        *("--trainer.callbacks+=dar_lightning.training.callbacks.EMA", "--trainer.callbacks.decay=0.7"),
        "--trainer.callbacks.update_starting_at_step=3",
        *("--ckpt_path=last", "--model.init_args.optimizer.lr=0.01", "--model.init_args.optimizer.weight_decay=0.1"),
        *("--model.init_args.optimizer.warmup_steps=3", "--model.init_args.optimizer.decay_steps=6"),
    ]
    if die_at is not None:
        callbacks += [f"--trainer.callbacks+={__name__}.DieAt", f"--trainer.callbacks.step={die_at}"]
    main([str(word) for word in [*command, *callbacks]])


def tokenizer_command(images, folder: Path) -> list:
    warmup = "--trainer.callbacks+=dar_lightning.training.callbacks.CodebookWarmup"
    settings = dict(warmup_steps=5, collect_steps=4, revive_every=3, revive_until=12)
    return [
        *fit_tokenizer(*images, folder, max_steps=STEPS, limit_val_batches=1, val_check_interval=3),
        warmup,
        *[f"--trainer.callbacks.{name}={value}" for name, value in settings.items()],
    ]


def ar_command(tokens, folder: Path) -> list:
    return fit_ar(*tokens, folder, max_steps=STEPS, limit_val_batches=1, val_check_interval=3)


def last(folder: Path) -> dict:
    """The newest checkpoint, which is what `ckpt_path: last` means too."""
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


WHAT = ("global_step", "state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "averaging_state")


def check(whole: dict, resumed: dict) -> None:
    assert whole["global_step"] == STEPS
    for key in WHAT:
        assert differences(whole[key], resumed[key], key) == []
    warm = [key for key in whole["callbacks"] if "CodebookWarmup" in key]
    assert differences([whole["callbacks"][key] for key in warm], [resumed["callbacks"][key] for key in warm]) == []


@pytest.fixture(scope="module")
def whole(images, tokens, tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("whole")
    run(tokenizer_command(images, root / "tokenizer"), every=STEPS)
    run(ar_command(tokens, root / "ar"), every=STEPS)
    return {part: last(root / part) for part in ("tokenizer", "ar")}


# The codebook starts from k-means after step 5 and is revived after 8 and 11: checkpoints in the middle of collecting
# latents, right after k-means, and in the middle of counting uses.
@pytest.mark.parametrize(
    ("part", "every", "die_at"), [("tokenizer", 3, 4), ("tokenizer", 5, 6), ("tokenizer", 7, 8), ("ar", 7, 13)]
)
def test_a_killed_training_goes_on(images, tokens, whole, tmp_path, part, every, die_at):
    command = tokenizer_command(images, tmp_path) if part == "tokenizer" else ar_command(tokens, tmp_path)
    with pytest.raises(Killed):
        run(command, every, die_at)
    assert last(tmp_path)["global_step"] == every
    run(command, every=STEPS)
    check(whole[part], last(tmp_path))
