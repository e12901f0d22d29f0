"""What ranks tell each other lies on the module's device: NCCL has no way for tensors of the CPU."""

import json
import math
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from killable import run


def run_script(*words: str) -> None:
    sys.argv = list(words)
    with redirect_stdout(None), redirect_stderr(None):
        runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="module")
def results(images, tokens, tokenizer_folder, tmp_path_factory) -> dict:
    """What each kind of run logged, or the first line of its error; and the metrics that it wrote."""
    folder = tmp_path_factory.mktemp("runs")
    script = Path(__file__).with_name("reduce_on_simulated_gpu.py")
    assert run(run_script, *map(str, (script, *images, *tokens, tokenizer_folder, folder))) == [0]
    written = {path.parts[-3]: json.loads(path.read_text())["metrics"] for path in folder.glob("*/evaluation/*")}
    return json.loads((folder / "results.json").read_text()) | {"written": written}


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("reconstruction_fid", ["val/rFD-color_edges", "val/rPSNR", "val/rSSIM", "val/flow"]),
        ("generation_fid", ["val/gFD-color_edges", "val/loss"]),
        ("tokenizer_training", ["codebook/use", "train/revived_codes", "train/skipped_steps", "val/psnr"]),
        ("ar_training", ["train/loss", "val/loss", "groups/val_loss_3"]),
        ("ablation_training", ["val/entropy"]),
        ("bad_samples", ["known"]),
    ],
)
def test_every_reduction_is_one_that_nccl_makes(results, name, logged):
    result = results[name]
    assert isinstance(result, dict), result
    assert all(math.isfinite(result[each]) for each in logged)
    for metric, value in results["written"].get(name, {}).items():  # the mean over ranks that all have it
        assert result[f"val/{metric}"] == pytest.approx(value, rel=1e-6)
    assert (name in results["written"]) == name.endswith("fid")


@pytest.mark.parametrize("part", ["tokenizer", "ar"])
def test_a_step_waits_for_nothing_that_it_has_put_on_the_device(results, part):
    """With two ranks, accumulation, skipped steps, signals, average, monitors and Lightning's own questions."""
    waits = [wait for wait in results["waits"][part] if wait[2] != "bad_samples.py"]  # the loader's, every 50 batches
    assert [wait for wait in waits if wait[0] <= wait[1]] == []  # step, step that made what is waited for, file
    assert {file for *_, file in waits} == {"late_reading.py"}
