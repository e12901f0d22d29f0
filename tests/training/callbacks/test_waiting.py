"""Throughput's share of waiting for data, and rates of all devices, where seconds are counted by hand."""

from types import SimpleNamespace

import pytest
import torch

from dar_lightning.training.callbacks import Throughput, throughput


def test_speed_waiting_and_bad_samples_of_all_devices(monkeypatch):
    """Eight devices; a batch of 16 takes 3 s, of which its loader waited 1 s. Every third step is logged."""
    clock, steps, rows = SimpleNamespace(now=1000.0), [], []
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(throughput, "is_log_step", lambda trainer: len(steps) % 3 == 0)

    def log_dict(values, prog_bar=False):
        assert all(value.device.type == "cpu" for value in values.values())
        rows[-1].update({(name, prog_bar): float(value) for name, value in values.items()})

    module = SimpleNamespace(log_dict=log_dict, device=torch.device("cpu"))
    loader = SimpleNamespace(waited=7.0)
    skipped = {"train": {"000000.tar/a": "empty file"}, "val": {"000000.tar/b": "no .cls member"}}
    data = SimpleNamespace(skipped=skipped)
    fake = SimpleNamespace(world_size=8, train_dataloader=loader, datamodule=data, precision="32-true")
    callback = Throughput()

    def train(count: int) -> None:
        for _ in range(count):
            steps.append(None)
            rows.append({})
            clock.now += 3.0
            loader.waited += 1.0
            callback.on_train_batch_end(fake, module, None, {"label": torch.zeros(16)}, 0)

    def validate() -> None:
        clock.now += 100.0
        callback.on_validation_end(fake, module)

    validate()  # the sanity check
    callback.on_train_start(fake, module)
    train(2)
    validate()  # in the middle of what is averaged over
    train(1)
    validate()  # at its edge
    train(3)
    numbers = {("speed/images_per_second", False): 8 * 16 / 3, ("data/images_per_second", False): 8 * 16 / 3}
    numbers |= {("data/skipped", False): 2, ("data/wait_share", True): 1 / 3}
    assert rows == [{}, {}, pytest.approx(numbers), {}, {}, pytest.approx(numbers)]
    fake.train_dataloader = SimpleNamespace()  # which does not measure
    callback.on_train_start(fake, module)
    clock.now += 2.0
    rows.append({})
    callback.on_train_batch_end(fake, module, None, {"label": torch.zeros(16)}, 0)
    assert ("data/wait_share", True) not in rows[-1]
    assert rows[-1]["data/images_per_second", False] == 8 * 16 / 2


@pytest.mark.parametrize(
    ("name", "precision", "dtype", "tflops"),
    [
        ("NVIDIA H200", "highest", torch.bfloat16, 989.5),  # unknown to Lightning's table
        ("NVIDIA H200", "high", torch.float32, 494.7),
        ("NVIDIA H100 NVL", "highest", torch.bfloat16, 835.5),  # twice as much there, of sparse matrices
        ("NVIDIA H100 80GB HBM3", "highest", torch.bfloat16, 989.4),
    ],
)
def test_dense_peaks_by_the_names_that_drivers_give(name, precision, dtype, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert throughput.peak_flops(torch.device("cuda"), dtype) == pytest.approx(1e12 * tflops)
