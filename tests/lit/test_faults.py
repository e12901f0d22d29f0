"""A part of benchmarks/faults.py: real kills, signals and broken disks, and what the runs make of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_part_of_the_benchmark(tmp_path):
    output = tmp_path / "faults.json"
    faults = ["kill -9, ", "SIGTERM in validation", "mended later", "kill -9 of rank 1 of 2, lightning"]
    words = [sys.executable, ROOT / "benchmarks/faults.py", "--kills", "2", "--output", output, "--only", *faults]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(words, capture_output=True, text=True, env=paths, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads(output.read_text())["rows"]
    names = [row["fault"] for row in rows if row["passed"]]
    disks = ["disk full, mended later", "disk read_only, mended later"] if "skipped" not in run.stdout else []
    assert names == [
        *("kill -9, tokenizer", "kill -9, ar", "SIGTERM in validation, tokenizer"),
        *(*disks, "kill -9 of rank 1 of 2, lightning"),
    ]
