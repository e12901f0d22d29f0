"""Devices by name, on machines that have them and on those that do not; precision settings."""

from types import SimpleNamespace

import pytest
import torch
from refusals import refused

from dar_lightning.cli import main
from dar_lightning.devices import choose_device, exact_products


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "chosen"),
    [
        (0, False, "auto", "cpu"),
        (2, False, "auto", "cuda"),
        (0, True, "auto", "cpu"),
        (2, False, "gpu", "cuda"),
        (0, True, "gpu", "mps"),
        (2, False, "cuda:1", "cuda:1"),
        (2, False, "cpu", "cpu"),
        (0, True, "mps", "mps"),
        (0, False, "gpu", "torch finds no GPU here"),
        (0, False, "cuda", "torch finds 0 cuda device"),
        (2, False, "cuda:2", "torch finds 2 cuda device"),
        (2, False, "mps", "torch finds 0 mps device"),
        (2, False, "tpu9", "tpu9 is none; give auto, cpu"),
        (2, False, "meta", "meta is none; give auto, cpu"),
    ],
)
def test_what_is_there_and_what_is_not(monkeypatch, gpus, mps, name, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    if " " not in chosen:
        assert choose_device(name) == torch.device(chosen)
        return
    refused(chosen, choose_device, name)


@pytest.mark.parametrize(("products", "convolutions"), [("highest", False), ("high", True)])
def test_convolutions_are_as_exact_as_products(monkeypatch, products, convolutions):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: products)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not convolutions)
    with pytest.raises(SystemExit):
        main(["sample", "--output", "x"])  # a mistake, found when the process has been set up
    assert torch.backends.cudnn.allow_tf32 == convolutions


@pytest.mark.parametrize("newer", [False, True])
def test_products_are_exact_for_a_while(monkeypatch, newer):
    """Whichever of torch's two settings the process uses; the older one cannot be read once the newer is used."""
    told, parts = ["high"], [SimpleNamespace(fp32_precision=value) for value in ("tf32", "bf16")]

    def read() -> str:
        if newer:
            raise RuntimeError("mix of the legacy and new APIs")
        return told[-1]

    def write(value: str) -> None:
        told.append(value)
        for part in parts:
            part.fp32_precision = "ieee"

    monkeypatch.setattr(torch, "get_float32_matmul_precision", read)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", write)
    for name, part in zip(("cuda", "mkldnn"), parts, strict=True):
        monkeypatch.setattr(torch.backends, name, SimpleNamespace(matmul=part))
    with pytest.raises(ZeroDivisionError), exact_products():
        1 / (told[-1] != "highest")
    assert told == (["high", "highest"] if newer else ["high", "highest", "high"])
    assert [part.fp32_precision for part in parts] == (["tf32", "bf16"] if newer else ["ieee", "ieee"])
