"""`dar fit --ckpt_path`: checkpoints go through the safe reader, and the command line decides about hyperparameters."""

import os

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from dar_lightning.ar.config import ARConfig
from dar_lightning.cli import main
from dar_lightning.weights.lightning import load_lightning_checkpoint

# Lightning warns of arguments given from within Python and of what it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore")
TINY = {"vocab_size": 16, "num_tokens": 8, "num_classes": 4, "dim": 16, "depth": 1, "num_heads": 2}


class RandomCodes(LightningDataModule):
    """Eight token sequences."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(16, (8, 8), generator=generator)
        return DataLoader([{"label": torch.tensor(i % 4), "codes": codes[i]} for i in range(8)], batch_size=4)


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def fit(folder, *options: str, config: dict | None = None) -> None:
    model = [f"--model.config.{name}={value}" for name, value in (TINY if config is None else config).items()]
    trainer = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": "false",
        "limit_val_batches": 0,
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
        "default_root_dir": folder,
    }
    main(
        ["fit", "--model=dar_lightning.training.ARModule", *model, f"--data={__name__}.RandomCodes"]
        + [f"--trainer.{name}={value}" for name, value in trainer.items()]
        + ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=run", *options]
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A two-step run's checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    fit(folder)
    return next(folder.rglob("*.ckpt"))


def refusal(capsys, *arguments, **options) -> str:
    """The one line on stderr with which a run ends, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fit(*arguments, **options)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dar")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("option", [[], ["--weights_only=false"]], ids=["plain", "weights_only=false"])
def test_a_malicious_checkpoint_runs_nothing(checkpoint, tmp_path, option, capsys):
    attack = tmp_path / "attack.ckpt"
    torch.save(torch.load(checkpoint) | {"callbacks": {"x": Attack(f"touch {tmp_path}/code_ran")}}, attack)
    line = refusal(capsys, tmp_path, f"--ckpt_path={attack}", *option)
    assert "system" in line or "weights_only" in line
    assert not (tmp_path / "code_ran").exists()


def test_a_truncated_checkpoint(checkpoint, tmp_path, capsys):
    (tmp_path / "half.ckpt").write_bytes(checkpoint.read_bytes()[:2000])
    assert "half.ckpt" in refusal(capsys, tmp_path, f"--ckpt_path={tmp_path / 'half.ckpt'}")


def test_a_checkpoint_of_another_shape(checkpoint, tmp_path, capsys):
    line = refusal(capsys, tmp_path, f"--ckpt_path={checkpoint}", config=TINY | {"depth": 2})
    assert "missing blocks.1" in line


def test_the_command_line_decides_about_hyperparameters(checkpoint, tmp_path):
    """Lightning's own CLI would put the checkpoint's values in the place of those given."""
    fit(tmp_path, f"--ckpt_path={checkpoint}", "--trainer.max_steps=4", config=TINY | {"class_dropout": 0.5})
    resumed = load_lightning_checkpoint(next(tmp_path.rglob("*.ckpt")))
    assert resumed.config == ARConfig(**TINY, class_dropout=0.5)
