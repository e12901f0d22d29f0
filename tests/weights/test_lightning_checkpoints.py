"""What `dar fit` writes: resumed from safely, exported with EMA or raw weights, rebuilt from the checkpoint alone."""

import json
import os

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.commands.export import export
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.training.ar import ARModule
from dar_lightning.training.checkpoint_io import SafeCheckpointIO
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.training.tokenizer import TokenizerModule
from dar_lightning.weights.lightning import load_lightning_checkpoint

CONFIG = ARConfig.preset("tiny", num_classes=4, vocab_size=16, num_tokens=8, dim=16, depth=1, num_heads=2)


def fit(module: LightningModule, steps: int, ema: bool = True, ckpt_path=None, folder=None) -> Trainer:
    torch.manual_seed(0)
    data = [{"label": torch.tensor(i % 4), "codes": torch.randint(16, (8,))} for i in range(8)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[EMAWeightAveraging(decay=0.5, use_buffers=False)] if ema else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=folder,
    )
    trainer.strategy.checkpoint_io = SafeCheckpointIO(module)
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return trainer


def module(config: ARConfig = CONFIG) -> ARModule:
    torch.manual_seed(0)
    return ARModule(config, OptimizerConfig(lr=0.01))


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


def train(module: LightningModule, ema: SaveAtStep, steps: int) -> None:
    torch.manual_seed(0)
    data = [{"label": torch.tensor(i % 4), "codes": torch.randint(16, (8,))} for i in range(12)]
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    Trainer(accelerator="cpu", max_steps=steps, callbacks=[ema], default_root_dir=ema.path.parent, **options).fit(
        module, DataLoader(data, batch_size=4)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of three steps with EMA, and the two sets of weights that it should hold."""
    path = tmp_path_factory.mktemp("run") / "x.ckpt"
    ema = SaveAtStep(path)
    train(module(), ema, 3)
    return path, ema


def test_ema_and_raw_weights_are_told_apart(run, tmp_path):
    path, ema = run
    assert not torch.equal(ema.raw["head.weight"], ema.average["head.weight"])
    for weights, expected in (("ema", ema.average), ("auto", ema.average), ("raw", ema.raw)):
        export(path, tmp_path / weights, weights)
        noted = json.loads((tmp_path / weights / "export.json").read_text())
        assert noted == {"checkpoint": str(path), "ema": weights != "raw"}
        again = ARModel.from_pretrained(tmp_path / weights)
        assert again.averaged is (weights != "raw")
        assert again.config == CONFIG
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_without_ema(tmp_path):
    trained = module()
    fit(trained, 1, ema=False, folder=tmp_path).save_checkpoint(tmp_path / "x.ckpt")
    assert model_sha256(load_lightning_checkpoint(tmp_path / "x.ckpt")) == model_sha256(trained.ar)
    assert model_sha256(load_lightning_checkpoint(tmp_path / "x.ckpt", "raw")) == model_sha256(trained.ar)
    with pytest.raises(UserError, match="no EMA weights"):
        export(tmp_path / "x.ckpt", tmp_path / "out", "ema")


def test_an_average_that_has_not_begun_is_not_taken(tmp_path):
    """It still holds the weights that training started from."""
    trained, path = module(), tmp_path / "x.ckpt"
    start = trained.ar.head.weight.clone()
    ema = SaveAtStep(path, update_starting_at_step=100)
    train(trained, ema, 2)
    assert not torch.equal(ema.raw["head.weight"], start)
    for weights in ("auto", "raw"):
        assert torch.equal(load_lightning_checkpoint(path, weights).head.weight, ema.raw["head.weight"])
    with pytest.raises(UserError, match=r"no EMA weights \(yet\)"):
        load_lightning_checkpoint(path, "ema")


def test_a_model_is_rebuilt_from_its_checkpoint_alone(run):
    path, ema = run
    again = load_lightning_checkpoint(path)
    assert again.config == CONFIG
    assert torch.equal(again.head.weight, ema.average["head.weight"])


@pytest.mark.parametrize("config", ["tiny", None])
def test_hyperparameters_are_plain(config, run):
    plain = (int, float, str, bool, type(None))
    hparams = TokenizerModule(preset="tiny").hparams if config == "tiny" else torch.load(run[0])["hyper_parameters"]
    assert all(isinstance(value, plain) for value in dict(hparams["config"]).values())
    assert all(isinstance(value, (*plain, dict)) for value in dict(hparams).values())


def test_resuming_continues_the_run(run, tmp_path):
    path, _ = run
    resumed = module()
    trainer = fit(resumed, 5, ckpt_path=path, folder=tmp_path)
    assert trainer.global_step == 5


def test_resuming_from_another_model_names_the_tensors(run, tmp_path):
    other = module(ARConfig(**(CONFIG.to_dict() | {"depth": 2})))
    with pytest.raises(UserError, match=r"missing blocks\.1"):
        fit(other, 5, ckpt_path=run[0], folder=tmp_path)
    with pytest.raises(UserError, match="is of the ar part"):
        SafeCheckpointIO(TokenizerModule(preset="tiny")).load_checkpoint(run[0])


@pytest.mark.parametrize("key", ["state_dict", "current_model_state"])
def test_resuming_from_weights_that_are_no_numbers(run, tmp_path, key):
    checkpoint = torch.load(run[0])
    checkpoint[key]["ar.norm.weight"][0] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
        fit(module(), 5, ckpt_path=tmp_path / "nan.ckpt", folder=tmp_path)


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("weights_only", [None, False])
def test_resuming_from_a_malicious_checkpoint_runs_nothing(run, tmp_path, weights_only):
    checkpoint = torch.load(run[0]) | {"callbacks": {"x": Attack(f"touch {tmp_path}/code_ran")}}
    torch.save(checkpoint, tmp_path / "attack.ckpt")
    with pytest.raises(UserError, match="system"):
        fit(module(), 5, ckpt_path=tmp_path / "attack.ckpt", folder=tmp_path)
    with pytest.raises(UserError, match="system"):
        SafeCheckpointIO(module()).load_checkpoint(tmp_path / "attack.ckpt", weights_only=weights_only)
    assert not (tmp_path / "code_ran").exists()


def test_init_from_takes_weights_only_and_lists_them(run, tmp_path, caplog):
    export(run[0], tmp_path / "ar")
    config = ARConfig(**(CONFIG.to_dict() | {"num_classes": 7, "class_dropout": 0.5}))
    with caplog.at_level("INFO"):
        tuned = ARModule(config, init_from=str(tmp_path / "ar"))
    assert tuned.ar.config == config, "the command line decides"
    assert torch.equal(tuned.ar.head.weight, ARModel.from_pretrained(tmp_path / "ar").head.weight)
    assert "class_embedding.weight" in caplog.text, "its shape differs: it starts fresh, and that is said"


def test_keys_that_are_no_names(run, tmp_path):
    checkpoint = torch.load(run[0])
    for change in ({7: 1}, {"state_dict": checkpoint["state_dict"] | {7: torch.zeros(1), None: 2}}):
        torch.save(checkpoint | change, tmp_path / "x.ckpt")
        assert load_lightning_checkpoint(tmp_path / "x.ckpt").config == CONFIG
    hyperparameters = {"config": {**CONFIG.to_dict(), 7: 1, None: 2}}
    torch.save(checkpoint | {"hyper_parameters": hyperparameters}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="ARConfig has no 7, None"):
        load_lightning_checkpoint(tmp_path / "x.ckpt")


def test_files_that_are_no_run(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="no checkpoint of a tokenizer or AR"):
        export(tmp_path / "x.ckpt", tmp_path / "out")
    torch.save({"state_dict": {"ar.x": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="hyper_parameters"):
        export(tmp_path / "x.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
