"""benchmarks/faults.py: one fault, a real kill, and a table that a cut benchmark leaves behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(output: Path) -> list[tuple[str, bool]]:
    return [(row["fault"], row["passed"]) for row in json.loads(output.read_text())["rows"]]


def test_a_benchmark_that_is_cut_keeps_its_finished_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from faults import Bench

    output = tmp_path / "faults.json"
    first = Bench(tmp_path / "one", 20, [""], output)
    first.row("survived", 1, lambda: "well")
    first.row("broken", 1, lambda: {}["nothing"])
    assert "KeyError" in capsys.readouterr().out
    second = Bench(tmp_path / "two", 20, [""], output)
    second.row("broken", 1, lambda: "mended")
    with pytest.raises(KeyboardInterrupt):
        second.row("cut", 1, lambda: signal.raise_signal(signal.SIGINT))
    assert rows(output) == [("survived", True), ("broken", True)]


@pytest.mark.slow
def test_a_part_of_the_benchmark(tmp_path):
    output = tmp_path / "faults.json"
    words = [sys.executable, ROOT / "benchmarks/faults.py", "--kills", "1", "--output", output, "--only", "kill -9, ar"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(words, capture_output=True, text=True, env=paths, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert rows(output) == [("kill -9, ar", True)]
