"""What ranks tell each other lies on the module's device: NCCL has no way for tensors of the CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(images, tokens, tokenizer_folder, tmp_path_factory) -> Path:
    """Where each kind of run wrote, and results.json: what it logged, or the first line of its error."""
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("reduce_on_simulated_gpu.py")
    paths = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}:{TESTS / 'training'}", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, script, *images, *tokens, tokenizer_folder, folder]
    subprocess.run([*map(str, command)], check=True, timeout=300, env=paths, capture_output=True)
    return folder


@pytest.mark.parametrize(
    ("run", "logged"),
    [
        ("reconstruction_fid", ["val/rFD-color_edges", "val/rPSNR", "val/rSSIM", "val/flow"]),
        ("generation_fid", ["val/gFD-color_edges", "val/loss"]),
        ("tokenizer_training", ["codebook/use", "train/revived_codes", "train/skipped_steps", "val/psnr"]),
        ("ar_training", ["train/loss", "val/loss", "groups/val_loss_3"]),
        ("ablation_training", ["val/entropy"]),
        ("bad_samples", ["known"]),
    ],
)
def test_every_reduction_is_one_that_nccl_makes(folder, run, logged):
    result = json.loads((folder / "results.json").read_text())[run]
    assert isinstance(result, dict), result
    assert all(math.isfinite(result[name]) for name in logged)


@pytest.mark.parametrize(("run", "name"), [("reconstruction_fid", "rFD"), ("generation_fid", "gFD")])
def test_the_distance_that_is_logged_is_the_one_that_is_written(folder, run, name):
    """The mean over ranks that all have it."""
    name = f"{name}-color_edges"
    (file,) = (folder / run / "evaluation").iterdir()
    result = json.loads((folder / "results.json").read_text())[run]
    assert result[f"val/{name}"] == pytest.approx(json.loads(file.read_text())["metrics"][name], rel=1e-6)
