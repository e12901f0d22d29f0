"""Jacobi sampling by its option: the same pictures from `dar sample` and from a GenerationModule, and what is noted."""

import json

import numpy as np
import pytest
import torch
from refusals import refusal
from tiny_models import make_pipeline

from dar_lightning.cli import main
from dar_lightning.generation.predict import GenerationModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(path)
    return str(path)


def test_dar_sample(folder, tmp_path, capsys):
    words = ["--pipeline", folder, "--classes", "red,grey", "--per_class", "1", "--frames", "1", "--guidance", "2"]
    drawn = []
    for window in (0, 5):
        main(["sample", *words, "--jacobi", str(window), "--output", str(tmp_path / f"{window}")])
        with np.load(tmp_path / f"{window}" / "samples.npz") as file:
            drawn.append(file["arr_0"].astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 1
    plain, record = (json.loads((tmp_path / f"{window}" / "samples.json").read_text()) for window in (0, 5))
    assert (record["jacobi"], record["decoding"]) == (5, "Jacobi")
    assert "jacobi" not in plain
    assert "--jacobi 5" in record["command"]
    said = refusal(capsys, ["sample", *words, "--jacobi", 9, "--output", tmp_path / "refused"])
    assert "jacobi is 9: it must be 0 (off) or a window of up to 8 tokens" in said


def test_generation_module(folder):
    batch = {"index": torch.arange(2), "label": torch.tensor([0, 3])}
    one, other = (GenerationModule(folder, rows=2, **more).predict_step(batch, 0).int() for more in ({}, {"jacobi": 8}))
    assert (one - other).abs().max() <= 1
    assert GenerationModule(folder, rows=2, jacobi=8).protocol["jacobi"] == 8
