"""`dar quickstart` is stopped in the middle of a training, twice, and goes on: real processes and real signals."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_quickstart import small_configs, small_photos
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dar_lightning.files import read_json
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

STEPS = 30
# The first training of the road from the shipped weights, with what comes after it left out. A shell may have told
# processes in the background to ignore Ctrl+C.
PROGRAM = """
import signal, sys
from dar_lightning.cli import main
from dar_lightning.commands import quickstart
signal.signal(signal.SIGINT, signal.default_int_handler)
output, quickstart.CONFIGS, quickstart.TRAIN = sys.argv[1:]
quickstart.VAL, road = quickstart.TRAIN, quickstart.road
quickstart.road = lambda out, from_scratch: [stage for stage in road(out, from_scratch) if stage.name == "tokenizer"]
quickstart.collect = quickstart.summary = lambda *_: "the end"
main(["quickstart", "--output", output])
"""


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_a_save(path: Path, process: subprocess.Popen) -> None:
    """Until a checkpoint is there that is not the one before."""
    before = path.stat().st_mtime_ns if path.exists() else None
    end = time.monotonic() + 120
    while (path.stat().st_mtime_ns if path.exists() else None) == before:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def logged_steps(logs: Path) -> list[int]:
    """Of the training loss, over all attempts, in the order of writing."""
    events = [event for path in sorted(logs.glob("events.*")) for event in EventFileLoader(str(path)).Load()]
    return [event.step for event in events if any(value.tag == "train/loss" for value in event.summary.value)]


@pytest.mark.slow
def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    configs = small_configs(tmp_path / "configs", from_scratch=False, tokenizer_steps=STEPS)
    words, run = (str(tmp_path / "out"), configs, small_photos(tmp_path / "photos")), tmp_path / "out/tokenizer"
    stops = []
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(*words)
        wait_for_a_save(run / "checkpoints/last.ckpt", process)
        process.send_signal(number)
        shown, _ = process.communicate(timeout=120)  # at the end of the training, too: it holds the same pipe
        assert process.returncode == 128 + number, shown
        stops += [int(step) for step in re.findall(rf"{number.name}: stopped after step (\d+), saved in", shown)]
        assert f"{number.name}: stage tokenizer stopped; start again to go on" in shown
    assert 4 <= stops[0] < stops[1] < STEPS
    process = start(*words)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 0, shown
    assert "the end" in shown
    steps = logged_steps(run / "logs")
    assert steps == sorted({*steps}), "no step was done twice"
    assert {*range(STEPS)} - {*steps} <= {stop - 1 for stop in stops}, "a stop comes before its step is logged"
    checkpoint = torch.load(run / "checkpoints/last.ckpt")
    assert checkpoint["global_step"] == STEPS
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == STEPS
    assert SequentialDiffusionTokenizer.from_pretrained(run / "weights").averaged
    assert read_json(tmp_path / "out/seconds.json")["tokenizer"] > 0
