"""DataSpeed in a real Trainer whose seconds are counted by hand: what it logs is then known to the digit."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, Dataset

from dar_lightning.errors import UserError
from dar_lightning.training.callbacks import DataSpeed, data_speed

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
SAMPLES, BATCH = 24, 4


class Clock:
    """Seconds pass when somebody says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(data_speed, "perf_counter", clock)
    return clock


class SlowDataset(Dataset):
    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict:
        self.clock.sleep(self.seconds)
        return {"image": torch.zeros(1), "label": 0}


class MeasuredLoader(DataLoader):
    """Measures the waiting for its batches."""

    waited = 0.0

    def __iter__(self):
        batches = super().__iter__()
        for _ in range(len(self)):
            start = self.dataset.clock()
            batch = next(batches)
            self.waited += self.dataset.clock() - start
            yield batch


class SlowData(L.LightningDataModule):
    def __init__(self, clock: Clock, seconds: float, loader: type = MeasuredLoader):
        super().__init__()
        self.clock, self.seconds, self.loader = clock, seconds, loader

    def train_dataloader(self):
        return self.loader(SlowDataset(self.clock, self.seconds), batch_size=BATCH)

    def val_dataloader(self):
        return DataLoader(SlowDataset(self.clock, 50.0), batch_size=BATCH)


class SlowModule(L.LightningModule):
    """A second goes by after each batch too, as if a checkpoint were written."""

    def __init__(self, clock: Clock, seconds: float):
        super().__init__()
        self.clock, self.seconds, self.weight = clock, seconds, torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        self.clock.sleep(self.seconds)
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
        found = {name: value for name, value in metrics.items() if name.startswith("data/")}
        if found:
            assert step not in self.rows, "one row per step"
            self.rows[step] = found


def fit(clock: Clock, data: SlowData, folder, ckpt_path=None, **options) -> tuple[Trainer, dict[int, dict]]:
    record = Record()
    settings = dict(max_steps=12, log_every_n_steps=3, num_sanity_val_steps=1, limit_val_batches=2)
    trainer = Trainer(
        accelerator="cpu",
        logger=record,
        callbacks=[DataSpeed()],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **settings | options,
    )
    trainer.fit(SlowModule(clock, 2.0), data, ckpt_path=ckpt_path)
    return trainer, record.rows


def test_speed_and_waiting(clock, tmp_path):
    """A batch takes 4 x 0.25 s to load and 2 s to train on; 1 s more goes by after it."""
    trainer, rows = fit(clock, SlowData(clock, 0.25), tmp_path, limit_val_batches=0)
    assert list(rows) == [2, 5, 8, 11], "every third step, counted as Lightning counts"
    first, *others = rows.values()  # after the batch at which it is logged, the second has not gone by
    assert first == pytest.approx({"data/images_per_second": 12 / 11, "data/wait_share": 3 / 11})
    for row in others:
        assert row == pytest.approx({"data/images_per_second": 1.0, "data/wait_share": 0.25})
    assert float(trainer.progress_bar_metrics["data/wait_share"]) == pytest.approx(0.25)
    assert "data/images_per_second" not in trainer.progress_bar_metrics


@pytest.mark.parametrize(("seconds", "share"), [(0.0, 0.0), (6.75, 0.9)])
def test_slow_data_is_told_from_slow_training(clock, tmp_path, seconds, share):
    _, rows = fit(clock, SlowData(clock, seconds), tmp_path, limit_val_batches=0)
    assert rows[11]["data/wait_share"] == pytest.approx(share)


def test_validation_counts_as_neither(clock, tmp_path):
    """In the middle of what is averaged over and at its edge, and as a sanity check before the start."""
    _, rows = fit(clock, SlowData(clock, 0.25), tmp_path, val_check_interval=2)
    assert list(rows) == [2, 5, 8, 11]
    # the second after a batch is not told from the validation that follows it
    assert rows[2] == pytest.approx({"data/images_per_second": 12 / 10, "data/wait_share": 3 / 10})
    assert rows[5] == pytest.approx({"data/images_per_second": 12 / 11, "data/wait_share": 3 / 11})


def test_accumulated_batches_are_one_step(clock, tmp_path):
    _, rows = fit(clock, SlowData(clock, 0.25), tmp_path, accumulate_grad_batches=2, limit_val_batches=0)
    assert list(rows) == [2, 5, 8, 11]
    assert rows[11] == pytest.approx({"data/images_per_second": 1.0, "data/wait_share": 0.25})


def test_a_resumed_run_goes_on_as_before(clock, tmp_path):
    trainer, _ = fit(clock, SlowData(clock, 0.25), tmp_path, max_steps=4, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    clock.sleep(1e6)
    trainer, rows = fit(clock, SlowData(clock, 0.25), tmp_path, tmp_path / "four.ckpt", limit_val_batches=0)
    assert list(rows) == [5, 8, 11]
    assert rows[5] == pytest.approx({"data/images_per_second": 8 / 7, "data/wait_share": 2 / 7}), "steps 5 and 6 alone"
    assert rows[11] == pytest.approx({"data/images_per_second": 1.0, "data/wait_share": 0.25})


def test_skipped_samples_are_counted(clock, tmp_path):
    data = SlowData(clock, 0.25)
    data.skipped = {"train": {"000000.tar/a": "empty file"}, "val": {"000000.tar/b": "no .cls member"}}
    _, rows = fit(clock, data, tmp_path, limit_val_batches=0)
    assert {row["data/skipped"] for row in rows.values()} == {2.0}


def test_images_of_all_devices(clock):
    """Batches are equal on all ranks."""
    logged = {}
    module = SimpleNamespace(log_dict=logged.update, log=lambda name, value, prog_bar: logged.update({name: value}))
    loader = SimpleNamespace(waited=7.0)
    trainer = SimpleNamespace(
        global_step=0, log_every_n_steps=1, world_size=8, train_dataloader=loader, datamodule=SimpleNamespace()
    )
    callback = DataSpeed()
    callback.on_train_start(trainer, module)
    clock.sleep(4.0)
    loader.waited += 1.0
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, {"label": torch.zeros(16)}, 0)
    assert {name: float(value) for name, value in logged.items()} == {
        "data/images_per_second": 32.0,
        "data/wait_share": 0.25,
    }
    assert all(value.device.type == "cpu" for value in logged.values())


def test_a_loader_that_does_not_measure_is_refused(clock, tmp_path):
    with pytest.raises(UserError, match="does not measure its waiting"):
        fit(clock, SlowData(clock, 0.0, DataLoader), tmp_path)
