"""Loaders under a Trainer that is stopped and resumed, and what a dead worker is called."""

import os
import signal
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from recorder import Recorder
from tiny_shards import module
from torch.utils.data import Dataset

from dar_lightning.data import workers
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.loader import Loader
from dar_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and loggers
KEYS = [f"photo-{number:03d}" for number in range(26)]


def fit(shards: Path, root: Path, ckpt_path=None, workers: int = 0, callbacks=(), model=None, **options):
    model = model or Recorder()
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, datamodule=module(shards, num_workers=workers), ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> tuple[list, Path]:
    """What an unbroken run saw in 15 steps (26 samples in batches of 4: 6 steps an epoch), and its checkpoints."""
    root = tmp_path_factory.mktemp("whole")
    checkpoint = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model, _ = fit(shards, root, callbacks=[checkpoint], max_steps=15)
    assert len(model.seen) == 15
    assert sorted(set(model.validated)) == KEYS
    assert len(model.validated) == 2 * len(KEYS)
    return model.seen, root


@pytest.mark.parametrize(("stop", "workers"), [(1, 2), (6, 0), (8, 0)])
def test_resume_from_a_step_checkpoint(shards, whole, tmp_path, workers, stop):
    """Step 6 is at the edge of an epoch; the number of workers may be another."""
    seen, root = whole
    resumed, _ = fit(shards, tmp_path, root / f"step={stop}.ckpt", workers, max_steps=15)
    assert resumed.seen == seen[stop:]


@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_epochs": 3, "limit_train_batches": 4}], ids=str)
def test_resume_from_an_epoch_checkpoint(shards, tmp_path, options):
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, _ = fit(shards, tmp_path, callbacks=[checkpoint], **options)
    for epoch in (0, 1):
        resumed, _ = fit(shards, tmp_path, tmp_path / f"epoch={epoch}.ckpt", **options)
        assert resumed.seen == whole.seen[len(whole.seen) // 3 * (epoch + 1) :]


def test_resume_after_validation_in_mid_epoch(shards, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)  # saves when validation ends
    options = {"max_steps": 14, "val_check_interval": 3}
    whole, _ = fit(shards, tmp_path, callbacks=[checkpoint], **options)
    for stop in (3, 6):
        resumed, _ = fit(shards, tmp_path, tmp_path / f"step={stop}.ckpt", **options)
        assert resumed.seen == whole.seen[stop:]


def test_longer_run_after_the_end(shards, whole, tmp_path):
    """`max_steps` was reached, and the same run is asked for more."""
    first, trainer = fit(shards, tmp_path, max_steps=6)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second, _ = fit(shards, tmp_path, tmp_path / "end.ckpt", max_steps=15)
    assert first.seen + second.seen == whole[0]


class Failing(Recorder):
    def training_step(self, batch, batch_idx):
        if len(self.seen) == 8:
            raise RuntimeError("preempted")
        return super().training_step(batch, batch_idx)


class SaveOnException(L.Callback):
    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "exception.ckpt")


def test_resume_from_the_middle_of_a_step(shards, whole, tmp_path):
    """A step that failed after its batch was fetched is done again."""
    with pytest.raises(RuntimeError, match="preempted"):
        fit(shards, tmp_path, callbacks=[SaveOnException()], model=Failing(), max_steps=15)
    resumed, _ = fit(shards, tmp_path, tmp_path / "exception.ckpt", max_steps=15)
    assert resumed.seen == whole[0][8:]


class Late(SingleDeviceStrategy):
    restore_checkpoint_after_setup = True


class Scheduled(Recorder):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 15
        return super().configure_optimizers()


def test_resume_of_a_strategy_that_restores_late(shards, whole, tmp_path):
    """FSDP reads the checkpoint when the loaders, whose length the learning rate's schedule needs, are there."""
    seen, root = whole
    options = {"strategy": Late(torch.device("cpu")), "max_steps": 15, "max_epochs": 9}
    resumed, _ = fit(shards, tmp_path, root / "step=8.ckpt", model=Scheduled(), **options)
    assert resumed.seen == seen[8:]


def test_validation_may_have_another_seed(shards, whole):
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(**quiet).validate(Recorder(), module(shards, seed=4), ckpt_path=whole[1] / "step=2.ckpt")


def test_loaders_made_anew_go_on(shards, whole, tmp_path):
    anew, _ = fit(shards, tmp_path, max_steps=15, reload_dataloaders_every_n_epochs=1)
    assert anew.seen == whole[0]
    data = module(shards)
    for _ in range(2):  # the second training is one of its own
        model = Recorder()
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        L.Trainer(max_steps=4, accelerator="cpu", **quiet).fit(model, datamodule=data)
        assert model.seen == whole[0][:4]


def test_overfit_repeats_the_same_batches(shards, tmp_path):
    model, _ = fit(shards, tmp_path, overfit_batches=2, max_epochs=3)
    assert model.seen[:2] == model.seen[2:4] == model.seen[4:]


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_has_every_sample_in_order(shards, workers):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches = trainer.predict(Recorder(), datamodule=module(shards, num_workers=workers))
    assert [key for keys in batches for key in keys] == KEYS


def test_training_without_validation_shards(shards, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **quiet)
    model = Recorder()
    trainer.fit(model, datamodule=ImageNetDataModule(str(shards), image_size=16, batch_size=13))
    assert len(model.seen) == 2


class Dying(Dataset):
    def __init__(self, end):
        self.end = end

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.end()
        return index


@pytest.mark.parametrize(("end", "memory"), [(partial(os._exit, 3), False), (partial(signal.raise_signal, 9), True)])
def test_memory_is_named_only_where_the_system_has_killed_a_worker(end, memory):
    with pytest.raises(UserError, match=r"^num_workers: DataLoader worker .*") as error:
        list(Loader(Dying(end), **workers.options(num_workers=1)))
    assert ("enough memory" in str(error.value)) == memory
