"""`dar validate|test|predict`, and callbacks, plugins and modules that are not this project's."""

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny_models import fit_ar, write_tokens

from dar_lightning.cli import main
from dar_lightning.training.checkpoint_io import SafeCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
CHECKPOINT = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "x", 8)


def command(verb: str, tokens, folder, *options: str) -> list[str]:
    return [verb, *(str(word) for word in fit_ar(tokens, tokens, folder)[1:]), *options]


def refusal(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dar")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_last_checkpoint_is_scored(verb, tokens, tmp_path, capsys):
    last = [*CHECKPOINT, "--ckpt_path=last"]
    line = refusal(capsys, command(verb, tokens, tmp_path, *last))
    assert f"no last checkpoint in {tmp_path / 'checkpoints'}" in line
    main(command("fit", tokens, tmp_path, "--trainer.max_steps=1", *last))
    main(command(verb, tokens, tmp_path, *last))
    assert f"{'val' if verb == 'validate' else 'test'}/loss" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "precision"), [([], "highest"), (["--float32_matmul_precision=high"], "high")])
def test_float32_is_exact_unless_told_otherwise(options, precision, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "highest")  # torch's default is True
    before = torch.get_float32_matmul_precision()
    try:
        main(command("fit", tokens, tmp_path, "--trainer.max_steps=1", *options))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (precision == "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_to_predict(tokens, tmp_path, capsys):
    assert "predict" in refusal(capsys, command("predict", tokens, tmp_path))


def test_one_callback_need_not_be_a_list(tokens, tmp_path):
    (tmp_path / "x.yaml").write_text(
        "trainer:\n  max_steps: 1\n  callbacks:\n    class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
    )
    main(command("fit", tokens, tmp_path / "run", f"--config={tmp_path / 'x.yaml'}"))
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) == 1


class OtherIO(TorchCheckpointIO):
    """A user's."""


def test_another_checkpoint_io_is_refused(tokens, tmp_path, capsys):
    line = refusal(capsys, command("fit", tokens, tmp_path, f"--trainer.plugins={__name__}.OtherIO"))
    assert "trainer.plugins: OtherIO cannot be used" in line


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}',
            "ModelParallelStrategy reads checkpoints past SafeCheckpointIO; use ddp",
        ),
        ("fsdp", "requires a GPU"),
        ("nonsense", "invalid strategy name"),
    ],
)
def test_another_strategy_is_refused(strategy, message, tokens, tmp_path, capsys):
    assert message in refusal(capsys, command("fit", tokens, tmp_path, f"--trainer.strategy={strategy}"))


def test_checkpoints_of_other_modules_are_read(tmp_path):
    module: LightningModule = BoringModel()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "x.ckpt")
    assert (
        SafeCheckpointIO(module).load_checkpoint(tmp_path / "x.ckpt")["state_dict"].keys() == module.state_dict().keys()
    )
