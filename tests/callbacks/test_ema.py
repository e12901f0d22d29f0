"""EMA against Lightning's own, where its average lies, and what it leaves out."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from tiny_models import SIZE, TOKENIZER, make_tokenizer

from dar_lightning.callbacks import EMA, ReconstructionFID
from dar_lightning.callbacks.ema import Average
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.lit import TokenizerModule
from dar_lightning.losses.frozen import FrozenNetwork
from dar_lightning.optim import OptimizerConfig
from dar_lightning.tokenizer.config import TokenizerConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of loaders and loggers


def module() -> TokenizerModule:
    config = {"latent_norm": "batch"}  # which has buffers
    made = TokenizerModule(TokenizerConfig(**TOKENIZER | config), OptimizerConfig(lr=1e-2))
    made.tokenizer.load_state_dict(make_tokenizer(**config).state_dict())
    return made


def checkpoints(images, callback: EMAWeightAveraging, folder: Path) -> list[dict]:
    """After 4 steps and after 7, the last 3 of which go on from the first checkpoint; with validation in between."""
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1)
    for steps in (4, 7):
        saving = ModelCheckpoint(folder, f"{steps}", every_n_train_steps=steps)
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[callback, saving], val_check_interval=2, **quiet
        )
        data = ImageNetDataModule(*images, image_size=SIZE, batch_size=4)
        trainer.fit(module(), datamodule=data, ckpt_path=folder / "4.ckpt" if steps == 7 else None)
    return [torch.load(folder / f"{steps}.ckpt", weights_only=True) for steps in (4, 7)]


NAME = "tokenizer.encoder.patchify.weight"


@pytest.mark.parametrize("start", [None, 2])
def test_it_is_lightnings_average(images, tmp_path, start):
    options = dict(decay=0.8, update_starting_at_step=start)
    theirs = checkpoints(images, EMAWeightAveraging(use_buffers=False, **options), tmp_path / "theirs")
    ours = checkpoints(images, EMA(**options), tmp_path / "ours")
    for mine, other in zip(ours, theirs, strict=True):
        assert not torch.equal(mine["state_dict"][NAME], mine["current_model_state"][NAME])
        for key in ("state_dict", "current_model_state", "averaging_state"):
            assert mine[key].keys() == other[key].keys()
            for name, tensor in mine[key].items():
                torch.testing.assert_close(tensor, other[key][name], rtol=1e-5, atol=1e-6)


def test_it_lies_where_the_model_trains_and_reads_nothing_there():
    """On the meta device nothing can be read."""
    model = torch.nn.Linear(3, 3)
    average = Average(model, torch.device("meta"), 0.9)
    assert average.module.weight.is_meta
    model.to("meta")
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
