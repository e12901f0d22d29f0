"""EMA against the formula, where its average lies, and what it leaves out."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import SIZE, TOKENIZER, make_tokenizer

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.metrics.frozen import FrozenNetwork
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import EMA, ReconstructionFID
from dar_lightning.training.callbacks.ema import Average
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import has_average

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of loaders and loggers


def module() -> TokenizerModule:
    config = {"latent_norm": "batch"}  # which has buffers
    made = TokenizerModule(TokenizerConfig(**TOKENIZER | config), OptimizerConfig(lr=1e-2))
    made.tokenizer.load_state_dict(make_tokenizer(**config).state_dict())
    return made


class Followed(Callback):
    """The average by hand, in float64; and what validation and the module's end see."""

    def __init__(self, decay: float, start: int):
        self.decay, self.start, self.validated = decay, start, []

    def weights(self, pl_module) -> list[torch.Tensor]:
        return [parameter.detach().double() for parameter in pl_module.parameters()]

    def on_train_start(self, trainer, pl_module):
        if not trainer.global_step:
            self.average = self.weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        step, new = trainer.global_step - 1, self.weights(pl_module)
        keep = self.decay if step >= self.start else 0.0
        self.average = [keep * old + (1 - keep) * now for old, now in zip(self.average, new, strict=True)]

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validated.append(same(self.weights(pl_module), self.average))


def same(found, expected) -> bool:
    return all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_the_null_of_older_configs_is_the_first_step():
    assert EMA(update_starting_at_step=None).update_starting_at_step == 0


@pytest.mark.parametrize("start", [0, 2, 5])
def test_it_is_the_formula_from_the_start_weights_on(images, tmp_path, start):
    """Over 4 steps and 3 more, which go on from a checkpoint; in validation, checkpoints and at the end.

    With a start of 5, the average has not begun in the first checkpoint.
    """
    seen = Followed(0.8, start)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    data = ImageNetDataModule(*images, image_size=SIZE, batch_size=4)
    for steps in (4, 7):
        saving = ModelCheckpoint(tmp_path, f"{steps}", every_n_train_steps=steps)
        callbacks = [EMA(0.8, update_starting_at_step=start), seen, saving]
        options = dict(max_steps=steps, val_check_interval=2, limit_val_batches=1)
        trainer, trained = Trainer(accelerator="cpu", callbacks=callbacks, **options, **quiet), module()
        trainer.fit(trained, data, ckpt_path=tmp_path / "4.ckpt" if steps == 7 else None)
        assert same(trained.parameters(), seen.average), "at the end"
        saved = torch.load(tmp_path / f"{steps}.ckpt", weights_only=True)
        names = [name for name, _ in trained.named_parameters()]
        assert same([saved["state_dict"][name] for name in names], seen.average)
        differ = not torch.equal(saved["state_dict"][names[0]], saved["current_model_state"][names[0]])
        assert differ == has_average(saved) == (steps > start)
    assert seen.validated == 3 * [True]


def test_it_lies_where_the_model_trains_and_reads_nothing_there():
    """On the meta device nothing can be read."""
    model = torch.nn.Linear(3, 3)
    average = Average(model, torch.device("meta"), 0.9)
    assert average.module.weight.is_meta
    model.to("meta")
    average.begin_anew(model)
    for _ in range(3):
        average.update_parameters(model)
    assert int(average.n_averaged) == 3


def test_frozen_networks_are_not_copied():
    model = module()
    model.perceptual = FrozenNetwork(torch.nn.Linear(3, 3))
    average = Average(model, torch.device("cpu"), 0.9).module
    assert average.perceptual.network is model.perceptual.network
    assert [name for name, _ in average.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(name.startswith("tokenizer.") for name, _ in average.named_parameters())


class Validated(Callback):
    """Whether validations see the weights that the optimizer has just left."""

    def __init__(self):
        self.trained, self.same = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.trained.append([parameter.detach().clone() for parameter in pl_module.parameters()])

    def on_validation_batch_end(self, trainer, pl_module, *args):
        pairs = zip(pl_module.parameters(), self.trained[-1], strict=True)
        self.same.append(all(torch.equal(*pair) for pair in pairs))


def test_until_the_average_begins_the_weights_are_used(images, tmp_path):
    seen, saving = Validated(), ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    callbacks = [EMA(0.8, update_starting_at_step=5), seen, saving, ReconstructionFID(None, "color_edges")]
    trained = module()
    trainer = Trainer(
        accelerator="cpu", max_steps=4, callbacks=callbacks, val_check_interval=2, num_sanity_val_steps=0, **quiet
    )
    data = ImageNetDataModule(*images, image_size=SIZE, batch_size=4)
    trainer.fit(trained, datamodule=data)
    assert seen.same == 4 * [True]
    assert all(torch.equal(*pair) for pair in zip(trained.parameters(), seen.trained[-1], strict=True)), "at the end"
    measuring = Trainer(accelerator="cpu", callbacks=[ReconstructionFID(None, "color_edges")], **quiet)
    measuring.validate(module(), data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    paths = [tmp_path / "evaluation" / f"rFD-color_edges-{step}.json" for step in ("0000004", "0000000")]
    fitted, validated = (json.loads(path.read_text()) for path in paths)
    assert [found["protocol"]["samples"]["ema"] for found in (fitted, validated)] == 2 * [{"tokenizer": False}]
    assert validated["metrics"] == pytest.approx(fitted["metrics"], rel=1e-5)
