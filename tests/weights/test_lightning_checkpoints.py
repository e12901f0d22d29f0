"""What `dar fit` writes: read safely, exported with EMA or raw weights, rebuilt from the checkpoint alone."""

import json
import os

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from refusals import refused
from torch.utils.data import DataLoader

from dar_lightning import ARConfig, ARModel
from dar_lightning.commands.export import export
from dar_lightning.errors import UserError
from dar_lightning.training.ar import ARModule
from dar_lightning.training.checkpoint_io import SafeCheckpointIO
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.training.tokenizer import TokenizerModule
from dar_lightning.weights import load_llama
from dar_lightning.weights.lightning import load_lightning_checkpoint

CONFIG = ARConfig.preset("tiny", num_classes=4, vocab_size=16, num_tokens=8, dim=16, depth=1, num_heads=2)


class SaveAtStep(EMAWeightAveraging):
    """EMA that also writes a checkpoint in the middle of training, where the two sets of weights differ."""

    def __init__(self, path, **options):
        super().__init__(decay=0.5, use_buffers=False, **options)
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.raw = {name: tensor.clone() for name, tensor in pl_module.ar.state_dict().items()}
        self.average = {name: tensor.clone() for name, tensor in self._average_model.module.ar.state_dict().items()}
        trainer.save_checkpoint(self.path)


def module(**changes) -> ARModule:
    torch.manual_seed(0)
    return ARModule(ARConfig(**CONFIG.to_dict() | changes), OptimizerConfig(lr=0.01))


def train(module: ARModule, steps: int, *callbacks: SaveAtStep) -> Trainer:
    data = [{"label": torch.tensor(i % 4), "codes": torch.arange(8) * i % 16} for i in range(12)]
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=list(callbacks), **quiet)
    trainer.fit(module, DataLoader(data, batch_size=4))
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of three steps with EMA, and the two sets of weights that it should hold."""
    ema = SaveAtStep(tmp_path_factory.mktemp("run") / "x.ckpt")
    train(module(), 3, ema)
    return ema.path, ema


@pytest.fixture
def edited(run, tmp_path):
    """Writes the run's checkpoint with other contents."""

    def write(**changes):
        torch.save(torch.load(run[0]) | changes, tmp_path / "x.ckpt")
        return tmp_path / "x.ckpt"

    return write


def test_ema_and_raw_weights_are_told_apart(run, tmp_path):
    path, ema = run
    assert not torch.equal(ema.raw["head.weight"], ema.average["head.weight"])
    for weights, expected in (("ema", ema.average), ("auto", ema.average), ("raw", ema.raw)):
        export(path, output=tmp_path / weights, weights=weights)
        noted = json.loads((tmp_path / weights / "export.json").read_text())
        assert noted == {"checkpoint": str(path), "ema": weights != "raw"}
        again = ARModel.from_pretrained(tmp_path / weights)
        assert again.averaged is (weights != "raw")
        assert again.config == CONFIG
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_a_checkpoint_goes_to_transformers(run, tmp_path):
    """The weights that are asked for, and not a tokenizer's."""
    path, ema = run
    for weights, expected in (("auto", ema.average), ("raw", ema.raw)):
        export(path, output=tmp_path, weights=weights, format="transformers")
        again = load_llama(tmp_path)
        assert (again.averaged, again.config) == (weights != "raw", CONFIG)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
        assert json.loads((tmp_path / "export.json").read_text())["checkpoint"] == str(path)


def test_a_tokenizer_does_not_go_to_transformers(tmp_path):
    tokenizer = TokenizerModule(preset="tiny")
    state = {f"tokenizer.{name}": tensor for name, tensor in tokenizer.tokenizer.state_dict().items()}
    hyperparameters = {"config": tokenizer.tokenizer.config.to_dict()}
    torch.save({"state_dict": state, "hyper_parameters": hyperparameters}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="is of a tokenizer: format 'transformers' needs that of an AR model"):
        export(tmp_path / "x.ckpt", output=tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("late", [False, True])
def test_without_an_average(tmp_path, late):
    """Without EMA; or with one that has not begun, and still holds the weights that training started from."""
    trained, ema = module(), SaveAtStep(tmp_path / "late.ckpt", update_starting_at_step=100)
    start = trained.ar.head.weight.clone()
    train(trained, 2, *[ema] * late).save_checkpoint(tmp_path / "end.ckpt")
    expected = ema.raw if late else trained.ar.state_dict()
    path = tmp_path / ("late.ckpt" if late else "end.ckpt")
    assert not torch.equal(expected["head.weight"], start)
    for weights in ("auto", "raw"):
        found = load_lightning_checkpoint(path, weights).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    refused(r"no EMA weights \(yet\)", export, path, output=tmp_path / "out", weights="ema")


def test_hyperparameters_are_plain(run):
    plain = (int, float, str, bool, type(None))
    for found in (TokenizerModule(preset="tiny").hparams, torch.load(run[0])["hyper_parameters"]):
        config = dict(found["config"])
        options = {}
        for name in ("quantizer_options", "condition_options", "backbone_options"):
            options |= config.pop(name, {})
        assert all(isinstance(value, plain) for value in (*config.values(), *options.values()))
        assert all(isinstance(value, (*plain, dict)) for value in dict(found).values())


def test_another_model_and_weights_that_are_no_numbers(run, edited):
    refused(
        r"config\.depth was 1 in the checkpoint and is 2 now",
        lambda: SafeCheckpointIO(module(depth=2)).load_checkpoint(run[0]),
    )
    with pytest.raises(UserError, match=r"missing blocks\.1"):
        SafeCheckpointIO(module(depth=2)).load_checkpoint(edited(hyper_parameters={}))
    refused("is of the ar part", lambda: SafeCheckpointIO(TokenizerModule(preset="tiny")).load_checkpoint(run[0]))
    for key in ("state_dict", "current_model_state"):
        weights = torch.load(run[0])[key]
        weights["ar.norm.weight"][0] = torch.nan
        with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
            SafeCheckpointIO(module()).load_checkpoint(edited(**{key: weights}))


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("weights_only", [None, False])
def test_a_malicious_checkpoint_runs_nothing(edited, tmp_path, weights_only):
    path = edited(callbacks={"x": Attack(f"touch {tmp_path}/code_ran")})
    refused("system", lambda: SafeCheckpointIO(module()).load_checkpoint(path, weights_only=weights_only))
    assert not (tmp_path / "code_ran").exists()


def test_init_from_takes_weights_only_and_lists_them(run, tmp_path, caplog):
    export(run[0], output=tmp_path / "ar")
    config = ARConfig(**(CONFIG.to_dict() | {"num_classes": 7, "class_dropout": 0.5}))
    with caplog.at_level("INFO"):
        tuned = ARModule(config, init_from=str(tmp_path / "ar"))
    assert tuned.ar.config == config, "the command line decides"
    assert torch.equal(tuned.ar.head.weight, ARModel.from_pretrained(tmp_path / "ar").head.weight)
    assert "class_embedding.weight" in caplog.text, "its shape differs: it starts fresh, and that is said"


def test_keys_that_are_no_names(run, edited):
    checkpoint = torch.load(run[0])
    state = checkpoint["state_dict"] | {7: torch.zeros(1), None: 2}
    assert load_lightning_checkpoint(edited(state_dict=state)).config == CONFIG
    with pytest.raises(UserError, match="ARConfig has no 7, None"):
        load_lightning_checkpoint(edited(hyper_parameters={"config": {**CONFIG.to_dict(), 7: 1, None: 2}}))


def test_files_that_are_no_run(tmp_path):
    for state, message in (({"x": 1}, "no checkpoint of a tokenizer or AR"), ({"ar.x": 1}, "hyper_parameters")):
        torch.save({"state_dict": {name: torch.zeros(1) for name in state}}, tmp_path / "x.ckpt")
        refused(message, export, tmp_path / "x.ckpt", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
