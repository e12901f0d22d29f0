"""The benchmark commands at their smallest: rows, ratios, another revision, and the page that shows them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import AR, TOKENIZER

from benchmarks import clock, measure, memory, plain, soak
from benchmarks.__main__ import main
from benchmarks.faults import Bench
from benchmarks.rows import ROWS, Setting
from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.training import ARModule, TokenizerModule

ROOT = Path(__file__).parents[1]


def measured(path: Path, *words) -> list | dict:
    """The rows that a command has written."""
    before = torch.get_num_threads()
    main([*map(str, words), "--output", str(path)])
    torch.set_num_threads(before)
    return json.loads(path.read_text())["rows"]


def test_rows_are_chosen_and_large_ones_left_out(tmp_path):
    options = ["--sizes", "tiny", "B", "--batches", 1, "--max_tflop", 1e-3, "--seconds", 0, "--threads", 1]
    chosen = ["rows", "--rows", "encode", "ar_step", "first_preview", *options]
    rows = {(row["row"], row["size"]): row for row in measured(tmp_path / "rows.json", *chosen)}
    tiny = [("encode", "tiny"), ("ar_step", "tiny"), ("first_preview", "tiny")]
    assert [key for key, row in rows.items() if "skipped" not in row] == tiny
    assert "max_tflop 0.001" in rows["ar_step", "B"]["skipped"]
    assert all(rows[key]["gflops"] > 0 and rows[key]["calls"] == 3 for key in tiny)
    assert json.loads((tmp_path / "rows.json").read_text())["machine"]["threads"] == 1


def test_a_size_that_no_row_has():
    with pytest.raises(UserError, match=r"^sizes XL: encode have none of them$"):
        main(["--rows", "encode", "--sizes", "XL"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name != "frechet"])
def test_every_row_runs_in_bfloat16(name):
    row = ROWS[name]
    row.build(Setting(row.sizes[0], dtype=torch.bfloat16 if row.lowers else torch.float32))()


def test_another_revision(tmp_path, monkeypatch):
    """A repository of its own, so that the test changes nothing here; its two revisions are the same code."""
    copy, left_out = tmp_path / "copy", shutil.ignore_patterns("__pycache__", "results", "shipped", "goldens")
    for folder in ("benchmarks", "dar_lightning", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z"]
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *words], cwd=copy, check=True)
    monkeypatch.setattr(measure, "ROOT", copy)
    (row,) = measure.against("HEAD", ["--rows", "quantizer", "--batches", "1", "--seconds=0"], 1, print)
    assert len(row["seconds"]) == len(row["revision_seconds"]) == 1
    assert row["speedup"] > 0
    assert not subprocess.run([*git, "worktree", "prune", "-v"], cwd=copy, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_every_ratio(tmp_path):
    rows = measured(tmp_path / "clock.json", "clock", "--tiny", "--budget", 0, "--threads", 1)
    assert [*rows] == [*clock.COMPARISONS]
    for name in ("quantizer", "quantizer_lookup", "quantizer_entropy"):
        assert rows[name]["indices_identical"]
    assert rows["generation"]["tokens_equal"] == 1
    assert rows["encoding"]["codes_identical"]
    assert rows["previews"]["last_identical"]


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


# ---- memory


MODULES = {
    "tokenizer": lambda: TokenizerModule(TokenizerConfig(**TOKENIZER)),
    "checkpointed": lambda: TokenizerModule(TokenizerConfig(**TOKENIZER), activation_checkpointing=memory.PARTS),
    "ar": lambda: ARModule(ARConfig(**AR)),
}


@pytest.mark.parametrize("name", MODULES)
def test_counted_is_what_a_real_step_keeps(name):
    counted = memory.count(MODULES[name], device="cpu")
    for batch_size in (3, 5):
        kept, flops = memory.forward(MODULES[name](), batch_size)
        expected = counted["activation_bytes_fixed"] + batch_size * counted["activation_bytes_per_sample"]
        assert kept == pytest.approx(expected, rel=0.01)
        assert flops == pytest.approx(batch_size * 1e9 * counted["forward_gflop_per_sample"], rel=0.01)


def test_a_gpu_is_not_needed():
    assert memory.count(lambda: ARModule(preset="B"))["parameters"] == 110_888_448
    assert not torch.is_autocast_enabled("cuda")


# ---- soak: what is called flat, on runs whose truth is known


@pytest.mark.parametrize(
    ("leak", "late", "flat"),
    [(0, {}, True), (4000, {}, False), *((0, {name: 12}, False) for name in ("file_descriptors", "threads"))],
)
def test_flat(leak, late, flat):
    """Of 10,000 steps: memory rises at the start, is noisy, and leaks so many bytes a step."""
    generator, constant = np.random.default_rng(0), {"file_descriptors": 11, "threads": 2, "processes": 1}
    memory = {step: 900 - 100 * np.exp(-step / 500) + generator.normal() for step in range(50, 10_001, 50)}
    found = soak.verdict(
        [
            {"step": step, "memory_mb": value + leak * step / 1e6} | constant | (late if step > 8000 else {})
            for step, value in memory.items()
        ]
    )
    assert found["flat"] == flat
    assert found["memory_bytes_per_step"] == pytest.approx(leak, rel=0.1, abs=200)


def test_what_a_process_and_its_children_hold(tmp_path):
    before = soak.held(os.getpid())
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with open(tmp_path / "x", "w"), subprocess.Popen([sys.executable, "-c", "print(); input()"], **pipes) as child:
        child.stdout.readline()
        during = soak.held(os.getpid())
        child.communicate(b"\n")
    assert during["processes"] == before["processes"] + 1
    assert during["file_descriptors"] >= before["file_descriptors"] + 3 + 3  # ours and two pipes, and the child's three
    assert during["memory_mb"] > before["memory_mb"] + 3


# ---- faults


def test_a_benchmark_that_is_cut_keeps_its_finished_rows(tmp_path, capsys):
    output = tmp_path / "faults.json"
    first = Bench(tmp_path / "one", 20, [""], output)
    first.row("survived", 1, lambda: "well")
    first.row("broken", 1, lambda: {}["nothing"])
    assert "KeyError" in capsys.readouterr().out
    second = Bench(tmp_path / "two", 20, [""], output)
    second.row("broken", 1, lambda: "mended")

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second.row("cut", 1, interrupted)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["fault"], row["passed"]) for row in rows] == [("survived", True), ("broken", True)]


@pytest.mark.slow
def test_a_part_of_the_faults(tmp_path):
    """A kill while a checkpoint is half written, a disk that breaks; the tests of resuming have more."""
    words = ["--kills", "1", "--only", "kill -9, ar", "disk full, mended", "--output", tmp_path / "faults.json"]
    command = [sys.executable, ROOT / "benchmarks/faults.py", *words]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=paths, timeout=600, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    disks = ["disk full, mended later"] if "skipped" not in run.stdout else []
    assert [row["fault"] for row in rows if row["passed"]] == ["kill -9, ar", *disks]
