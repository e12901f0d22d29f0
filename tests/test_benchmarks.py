"""The benchmark command at its smallest: every row, the ratios, another revision, and the page that shows them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import clock, plain
from benchmarks.rows import ROWS, Setting
from dar_lightning import ARConfig
from dar_lightning.ar.sampling import generate

ROOT = Path(__file__).parents[1]


def run(*words, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks", *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_row(tmp_path):
    done = run("--seconds=0", "--batches", 1, "--threads", 1, "--output", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "rows.json").read_text())
    assert {row["row"] for row in result["rows"]} == {*ROWS}
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == 1
    for row in result["rows"]:
        assert row["latency_seconds"] > 0
        assert row["calls"] == 3


def test_rows_are_chosen_and_large_ones_left_out(tmp_path):
    options = ["--sizes", "tiny", "B", "--batches", 1, "--max_tflop", 1e-3, "--seconds", 0]
    done = run("rows", "--rows", "encode", "ar_step", *options, "--output", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    rows = {(row["row"], row["size"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert [*rows] == [("encode", "tiny"), ("ar_step", "tiny"), ("ar_step", "B")]
    assert "max_tflop 0.001" in rows["ar_step", "B"]["skipped"]
    assert rows["encode", "tiny"]["gflops"] > 0


def test_a_size_that_no_row_has_is_told_in_one_line():
    done = run("--rows", "encode", "--sizes", "XL")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: sizes XL: encode have none of them"]


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].compiles])
def test_rows_run_in_bfloat16(name):
    ROWS[name].build(Setting("tiny", dtype=torch.bfloat16))()


def test_another_revision(tmp_path):
    """A repository of its own, so that the test changes nothing here; its two revisions are the same code."""
    copy = tmp_path / "copy"
    for folder in ("benchmarks", "dar_lightning"):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results", "shipped")
        )
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z"]
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *words], cwd=copy, check=True)
    options = ["--rows", "quantizer", "--batches", 1, "--seconds", 0, "--pairs", 1]
    done = run("against", "HEAD", *options, "--output", tmp_path / "pairs.json", folder=copy)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "pairs.json").read_text())["rows"]
    assert len(row["seconds"]) == len(row["revision_seconds"]) == 1
    assert row["speedup"] > 0
    assert not subprocess.run([*git, "worktree", "prune", "-v"], cwd=copy, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_every_ratio(tmp_path):
    done = run("clock", "--tiny", "--budget", 0, "--threads", 1, "--output", tmp_path / "clock.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "clock.json").read_text())
    assert [*result["rows"]] == [*clock.COMPARISONS]
    for name in ("quantizer", "quantizer_lookup", "quantizer_entropy"):
        assert result["rows"][name]["indices_identical"]
    assert result["rows"]["generation"]["tokens_equal"] == 1
    assert result["rows"]["encoding"]["codes_identical"]
    assert result["rows"]["previews"]["last_identical"]


def test_the_static_cache_draws_the_same_tokens():
    ar, labels = clock.sampler(ARConfig.preset("tiny")), torch.arange(3)
    theirs = plain.generate(ar, labels, torch.Generator().manual_seed(1))
    assert torch.equal(generate(ar, labels, generator=torch.Generator().manual_seed(1)), theirs)
    assert len(theirs.unique()) > 10


def test_the_page_shows_the_stored_ratios():
    result = json.loads((ROOT / "benchmarks/results/clock.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    assert clock.inserted(page, clock.table(result)) == page, "python -m benchmarks table --write docs/performance.md"
    other = {**result, "rows": {"encoding": {"what": "x", "skipped": "why"}}}
    assert "| x | why |" in clock.inserted(page, clock.table(other))
