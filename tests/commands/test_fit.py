"""`dar fit|validate|test|predict`: checkpoints that are given, and callbacks and plugins of others."""

import os

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from refusals import refusal
from tiny_models import fit_ar, options, write_tokens

from dar_lightning.cli import main
from dar_lightning.weights.lightning import load_lightning_checkpoint

CHECKPOINT = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "x", 8)


@pytest.fixture(scope="module")
def trained(tokens, tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    main(command("fit", tokens, folder, "--trainer.max_steps=1", *CHECKPOINT))
    return folder


def command(verb: str, tokens, folder, *more: str) -> list[str]:
    return [verb, *(str(word) for word in fit_ar(tokens, tokens, folder)[1:]), *more]


@pytest.mark.parametrize(("verb", "logged"), [("validate", "val/loss"), ("test", "test/loss")])
def test_the_last_checkpoint_is_scored(verb, logged, tokens, trained, tmp_path, capsys, recwarn):
    last = [*CHECKPOINT, "--ckpt_path=last"]
    line = refusal(capsys, command(verb, tokens, tmp_path, *last))
    assert f"no last checkpoint in {tmp_path / 'checkpoints'}" in line
    main(command(verb, tokens, trained, *last))
    assert logged in capsys.readouterr().out
    assert [str(each.message) for each in recwarn if "args" in str(each.message)] == [], "nobody called it from Python"


@pytest.mark.parametrize(("more", "precision"), [([], "highest"), (["--float32_matmul_precision=high"], "high")])
def test_float32_is_exact_unless_told_otherwise(more, precision, tokens, tmp_path, monkeypatch):
    """A single callback need not be a list; its checkpoints go to the run's folder."""
    (tmp_path / "x.yaml").write_text(
        "trainer:\n  max_steps: 1\n  callbacks:\n    class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
    )
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "highest")  # torch's default is True
    before = torch.get_float32_matmul_precision()
    try:
        main(command("fit", tokens, tmp_path / "run", f"--config={tmp_path / 'x.yaml'}", *more))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == (precision == "high")
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))) == 1


class OtherIO(TorchCheckpointIO):
    """A user's."""


PARALLEL = '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'


@pytest.mark.parametrize(
    ("verb", "more", "says"),
    [
        ("predict", [], "predict"),
        ("fit", [f"--trainer.plugins={__name__}.OtherIO"], "trainer.plugins: OtherIO cannot be used"),
        ("fit", [f"--trainer.strategy={PARALLEL}"], "ModelParallelStrategy reads checkpoints past SafeCheckpointIO"),
        ("fit", ["--trainer.strategy=fsdp"], "requires a GPU"),
        ("fit", ["--trainer.strategy=nonsense"], "invalid strategy name"),
    ],
)
def test_what_is_refused(verb, more, says, tokens, tmp_path, capsys):
    assert says in refusal(capsys, command(verb, tokens, tmp_path, *more))


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("more", [[], ["--weights_only=false"]], ids=str)
def test_a_malicious_checkpoint_runs_nothing(trained, tokens, tmp_path, more, capsys):
    attack = tmp_path / "attack.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt")
    torch.save(content | {"callbacks": {"x": Attack(f"touch {tmp_path}/code_ran")}}, attack)
    line = refusal(capsys, command("fit", tokens, tmp_path / "run", f"--ckpt_path={attack}", *more))
    assert "system" in line or "weights_only" in line
    assert not (tmp_path / "code_ran").exists()


def test_a_checkpoint_that_is_cut_or_of_another_shape(trained, tokens, tmp_path, capsys):
    last = trained / "checkpoints" / "last.ckpt"
    (tmp_path / "half.ckpt").write_bytes(last.read_bytes()[:2000])
    half = command("fit", tokens, tmp_path / "run", f"--ckpt_path={tmp_path / 'half.ckpt'}")
    assert "half.ckpt" in refusal(capsys, half)
    deeper = command("fit", tokens, tmp_path / "run", f"--ckpt_path={last}", "--model.init_args.config.depth=3")
    assert "config.depth was 2 in the checkpoint and is 3 now" in refusal(capsys, deeper)


def test_the_command_line_decides_about_hyperparameters(trained, tokens, tmp_path):
    """Lightning's own CLI would put the checkpoint's values in the place of those given."""
    words = [f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}", "--trainer.max_steps=3"]
    words += options("model.init_args.config", dict(class_dropout=0.5))
    main(command("fit", tokens, tmp_path, *words))
    assert load_lightning_checkpoint(next(tmp_path.rglob("*.ckpt"))).config.class_dropout == 0.5
