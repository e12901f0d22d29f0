"""A part of benchmarks/faults.py: real kills, signals and broken disks, and what the runs make of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


ROWS = """
import os, signal, sys
from pathlib import Path
from faults import Bench

folder = Path(sys.argv[1])
first = Bench(folder / "one", 20, [""], folder / "faults.json")
first.row("survived", 1, lambda: "well")
first.row("broken", 1, lambda: {}["nothing"])
second = Bench(folder / "two", 20, [""], folder / "faults.json")
second.row("broken", 1, lambda: "mended")
second.row("cut", 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_benchmark_that_is_cut_keeps_its_finished_rows(tmp_path):
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-c", ROWS, tmp_path]
    run = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, timeout=120, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [(row["fault"], row["outcome"], row["passed"]) for row in rows] == [
        ("survived", "well", True),
        ("broken", "mended", True),
    ]
    assert "KeyError" in run.stdout.decode()


@pytest.mark.slow
def test_a_part_of_the_benchmark(tmp_path):
    output = tmp_path / "faults.json"
    faults = ["kill -9, ar", "SIGTERM in validation", "mended later", "kill -9 of rank 1 of 2, lightning"]
    words = [sys.executable, ROOT / "benchmarks/faults.py", "--kills", "2", "--output", output, "--only", *faults]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(words, capture_output=True, text=True, env=paths, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads(output.read_text())["rows"]
    names = [row["fault"] for row in rows if row["passed"]]
    disks = ["disk full, mended later", "disk read_only, mended later"] if "skipped" not in run.stdout else []
    first = ["kill -9, ar", "SIGTERM in validation, tokenizer"]
    assert names == [*first, *disks, "kill -9 of rank 1 of 2, lightning"]
