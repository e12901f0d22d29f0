"""Throughput's share of waiting for data, in a real Trainer whose seconds are counted by hand."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from tiny_training import trainer
from torch.utils.data import DataLoader

from dar_lightning.training.callbacks import Throughput, throughput

BATCH = 4


class Clock:
    """Seconds pass when somebody says so."""

    now = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock.now)
    return clock


class SlowDataset:
    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict:
        self.clock.sleep(self.seconds)
        return {"image": torch.zeros(1), "label": 0}


class MeasuredLoader(DataLoader):
    """Measures the waiting for its batches."""

    waited = 0.0

    def __iter__(self):
        start = self.dataset.clock.now
        for batch in super().__iter__():
            self.waited += self.dataset.clock.now - start
            yield batch
            start = self.dataset.clock.now


class Slow(L.LightningModule):
    """A batch takes 2 s; a second goes by after it too, as if a checkpoint were written."""

    def __init__(self, clock: Clock):
        super().__init__()
        self.clock, self.weight = clock, torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        self.clock.sleep(2.0)
        return (self.weight * batch["image"]).sum()

    def validation_step(self, batch, batch_idx):
        self.clock.sleep(30.0)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.clock.sleep(1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Record(DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        if found := {name: value for name, value in metrics.items() if name.startswith("data/")}:
            assert step not in self.rows, "one row per step"
            self.rows[step] = found


def fit(clock: Clock, seconds: float, loader: type = MeasuredLoader, **options):
    data = L.LightningDataModule.from_datasets(None)
    data.train_dataloader = lambda: loader(SlowDataset(clock, seconds), batch_size=BATCH)
    data.val_dataloader = lambda: DataLoader(SlowDataset(clock, 50.0), batch_size=BATCH)
    data.skipped = {"train": {"000000.tar/a": "empty file"}, "val": {"000000.tar/b": "no .cls member"}}
    settings = dict(max_steps=12, log_every_n_steps=3, num_sanity_val_steps=1, limit_val_batches=0, logger=Record())
    run = trainer(Throughput(), **settings | options)
    run.fit(Slow(clock), data)
    return run, run.logger.rows


def row(images_per_second: float, wait_share: float):
    values = {"images_per_second": images_per_second, "wait_share": wait_share, "skipped": 2}
    return pytest.approx({f"data/{name}": value for name, value in values.items()})


def test_speed_and_waiting(clock):
    """A batch takes 4 x 0.25 s to load and 2 s to train on; 1 s more goes by after it."""
    run, rows = fit(clock, 0.25)
    assert list(rows) == [2, 5, 8, 11], "every third step, counted as Lightning counts"
    first, *others = rows.values()  # after the batch at which it is logged, the second has not gone by
    assert first == row(12 / 11, 3 / 11)
    assert others == [row(1.0, 0.25)] * 3
    assert float(run.progress_bar_metrics["data/wait_share"]) == pytest.approx(0.25)
    assert "data/images_per_second" not in run.progress_bar_metrics
    _, unmeasured = fit(clock, 0.0, DataLoader, max_steps=3)
    assert unmeasured[2].keys() == {"data/images_per_second", "data/skipped"}


def test_validation_counts_as_neither(clock):
    """In the middle of what is averaged over and at its edge, and as a sanity check before the start."""
    _, rows = fit(clock, 0.25, val_check_interval=2, limit_val_batches=2, max_steps=6)
    # the second after a batch is not told from the validation that follows it
    assert [rows[2], rows[5]] == [row(12 / 10, 3 / 10), row(12 / 11, 3 / 11)]


def test_images_of_all_devices(clock, monkeypatch):
    """Batches are equal on all ranks."""
    monkeypatch.setattr(throughput, "is_log_step", lambda trainer: True)
    logged = {}
    module = SimpleNamespace(log_dict=lambda values, **_: logged.update(values), device=torch.device("cpu"))
    loader = SimpleNamespace(waited=7.0)
    fake = SimpleNamespace(world_size=8, train_dataloader=loader, datamodule=SimpleNamespace(), precision="32-true")
    callback = Throughput()
    callback.on_train_start(fake, module)
    clock.sleep(4.0)
    loader.waited += 1.0
    callback.on_train_batch_end(fake, module, None, {"label": torch.zeros(16)}, 0)
    assert (logged["data/images_per_second"], logged["data/wait_share"]) == (32.0, 0.25)
    assert all(value.device.type == "cpu" for value in logged.values())
