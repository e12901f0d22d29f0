"""Throughput's speed and its share of waiting, on a run whose seconds are counted by hand."""

from types import SimpleNamespace

import pytest
import torch

from dar_lightning.training.callbacks import Throughput, throughput

CPU, BATCH = torch.device("cpu"), {"label": torch.zeros(16)}


class Run:
    """A Trainer, its module and what is logged: after every third batch of 16 images."""

    def __init__(self, monkeypatch, measured: bool = True, **trainer):
        self.now, self.batches, self.rows = 1000.0, 0, []
        monkeypatch.setattr(throughput, "perf_counter", lambda: self.now)
        monkeypatch.setattr(throughput, "is_log_step", lambda trainer: self.batches % 3 == 0)
        loader = SimpleNamespace(waited=7.0) if measured else SimpleNamespace()
        data = SimpleNamespace(skipped={"train": {"a.tar/1": "empty file"}, "val": {"a.tar/2": "no .cls member"}})
        values = dict(world_size=1, train_dataloader=loader, datamodule=data, precision="32-true")
        self.trainer = SimpleNamespace(**values | trainer)
        self.module = SimpleNamespace(device=CPU, log_dict=self.log)
        self.callback = Throughput()
        self.callback.on_train_start(self.trainer, self.module)

    def log(self, values: dict, prog_bar: bool = False) -> None:
        assert all(value.device == CPU for value in values.values()), "a number of the GPU would be waited for"
        assert prog_bar == ("data/wait_share" in values)
        self.rows.append({name: float(value) for name, value in values.items()})

    def batch(self, waiting: float, training: float) -> None:
        self.now += waiting + training
        if hasattr(self.trainer.train_dataloader, "waited"):
            self.trainer.train_dataloader.waited += waiting
        self.batches += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, BATCH, 0)

    def validation(self, seconds: float) -> None:
        self.now += seconds
        self.callback.on_validation_end(self.trainer, self.module)


def test_speed_and_waiting(monkeypatch):
    """48 images in 3 times 4 seconds, of which one is waited; then nine."""
    run = Run(monkeypatch)
    for waiting in (1.0, 1.0, 1.0, 9.0, 9.0, 9.0):
        run.batch(waiting, 3.0)
    speeds = [run.rows[0], run.rows[2]]
    assert [row["data/images_per_second"] for row in speeds] == [row["speed/images_per_second"] for row in speeds]
    assert [row["data/images_per_second"] for row in speeds] == pytest.approx([48 / 12, 48 / 36])
    assert [run.rows[1]["data/wait_share"], run.rows[3]["data/wait_share"]] == pytest.approx([0.25, 0.75])
    assert run.rows[0]["data/skipped"] == 2


def test_validation_counts_as_neither(monkeypatch):
    """In the middle of what is averaged over, at its edge, and without any training."""
    run = Run(monkeypatch)
    Throughput().on_validation_end(run.trainer, run.module)
    for _ in range(6):
        run.batch(1.0, 3.0)
        run.validation(100.0)
    assert [row["data/images_per_second"] for row in run.rows[::2]] == pytest.approx([4.0, 4.0])
    assert [row["data/wait_share"] for row in run.rows[1::2]] == pytest.approx([0.25, 0.25])


def test_all_devices_count_and_a_loader_need_not_measure(monkeypatch):
    """Batches are equal on all ranks."""
    run = Run(monkeypatch, measured=False, world_size=8, datamodule=None)
    for _ in range(3):
        run.batch(1.0, 3.0)
    assert run.rows == [{"speed/images_per_second": 32.0, "data/images_per_second": 32.0}]
