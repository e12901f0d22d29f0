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
import torch.nn.functional as F
from tiny_models import AR, TOKENIZER
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import clock, faults, measure, memory, mutants, official, soak
from benchmarks.__main__ import main
from benchmarks.machine import record
from benchmarks.rows import ROWS, Setting
from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.training import ARModule, TokenizerModule

ROOT = Path(__file__).parents[1]


def measured(path: Path, key: str, *words) -> dict:
    """The rows that a command has written."""
    before = torch.get_num_threads()
    main([*map(str, words), "--threads", "1", "--output", str(path)])
    torch.set_num_threads(before)
    result = json.loads(path.read_text())
    assert result["machine"]["threads"] == 1
    return {row[key]: row for row in result["rows"]}


def test_rows_are_chosen_and_large_ones_left_out(tmp_path):
    options = ["--sizes", "tiny", "B", "--batches", 1, "--max_tflop", 1e-3, "--seconds", 0]
    rows = measured(tmp_path / "rows.json", "size", "rows", "--rows", "ar_step", *options)
    assert [size for size, row in rows.items() if "skipped" not in row] == ["tiny"]
    assert "max_tflop 0.001" in rows["B"]["skipped"]
    assert rows["tiny"]["gflops"] > 0
    assert rows["tiny"]["calls"] == 3
    with pytest.raises(UserError, match=r"^sizes XL: encode have none of them$"):
        main(["--rows", "encode", "--sizes", "XL"])
    with pytest.raises(UserError, match=r"^rows: guided is none of encode, decode, "):
        main(["rows", "--rows", "guided"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name != "frechet"])
def test_every_row_runs_in_bfloat16(name):
    row = ROWS[name]
    row.build(Setting(row.sizes[0], dtype=torch.bfloat16 if row.lowers else torch.float32))()


def test_another_revision(tmp_path, monkeypatch):
    """A repository of its own, whose package is a number: how long a call takes."""
    copy = tmp_path / "copy"
    for folder in ("dar_lightning", "benchmarks"):
        (copy / folder).mkdir(parents=True)
    row = dict.fromkeys(measure.SAME, "x") | {"latency_seconds": 0}
    program = (
        f"import json, sys, pathlib\nrow = {row}\nrow['latency_seconds'] = float(open('dar_lightning/x').read())\n"
    )
    (copy / "dar_lightning/x").write_text("3")
    (copy / "benchmarks/__main__.py").write_text("raise SystemExit('not of the revision')")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z"]
    for words in (["init", "--quiet"], ["add", "-A"], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *words], cwd=copy, check=True)
    (copy / "dar_lightning/x").write_text("2")
    (copy / "benchmarks/__main__.py").write_text(program + "json.dump({'rows': [row]}, open(sys.argv[-1], 'w'))")
    monkeypatch.setattr(measure, "ROOT", copy)
    (found,) = measure.against("HEAD", ["--rows", "quantizer"], 2)
    assert (found["seconds"], found["revision_seconds"], found["speedup"]) == ([2, 2], [3, 3], 1.5)
    assert not subprocess.run([*git, "worktree", "prune", "-v"], cwd=copy, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_every_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(clock, "limits", lambda clock: {"float32_gflops": 100.0})
    monkeypatch.setattr(clock, "LEAST_PAIRS", 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)  # compiling takes a minute
    rows = measured(tmp_path / "clock.json", "row", "clock", "--tiny", "--budget", 0)
    assert [*rows] == [*clock.COMPARISONS]
    assert [name for name, row in rows.items() if "skipped" in row] == ["compile"]
    assert all(rows[f"quantizer{form}"]["indices_identical"] for form in ("", "_lookup", "_entropy"))
    assert rows["previews"]["last_identical"]
    rows = measured(tmp_path / "official.json", "row", "official", "--tiny", "--budget", 0)
    assert [*rows] == [*official.ROWS]
    assert all(0 < row["products_share"] < 1 for row in rows.values())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_official_way_draws_the_same_tokens(guidance):
    ar, labels = clock.sampler("tiny"), torch.arange(3)
    theirs = official.generate(ar, labels, guidance, greedy=True)
    assert torch.equal(generate(ar, labels, guidance=guidance, top_k=1), theirs)
    assert len(theirs.unique()) > 10
    drawn = official.generate(ar, labels, guidance, count=2)
    assert drawn.shape == (3, 2)


def test_the_official_way_computes_the_same_losses():
    model, images = clock.tokenizer("tiny", 2, repa_layer=1, decoder_dim=128)
    u, noise = (
        torch.ones(2),
        torch.randn_like(images),
    )  # a time that reads all tokens: none is left out of vq and commit
    ours = model.training_losses(images, u, noise)
    ours = ours["flow"] + ours["vq"] + ours["commit"] + model.decoder.project_hidden(ours["hidden"], (8, 8)).mean()
    torch.testing.assert_close(official.tokenizer_loss(model, images, u, noise), ours)
    assert torch.equal(official.encode(model.eval(), images), model.tokenize(images))

    ar, codes = clock.sampler("tiny").train(), torch.arange(64).view(2, 32)
    for part in ar.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    losses = []
    for loss in (official.ar_loss, lambda *given: F.cross_entropy(ar(*given[1:]).flatten(0, 1), codes.flatten())):
        torch.manual_seed(0)  # labels are dropped
        losses.append(loss(ar, torch.arange(2), codes))
    torch.testing.assert_close(*losses)


def test_products_alone_are_those_of_the_work():
    x, weight = torch.randn(4, 5), torch.randn(3, 5)
    products = official.Products(lambda: F.silu(F.linear(x, weight)).sum())
    (product,) = products.calls
    assert torch.equal(product(), x @ weight.T)
    with FlopCounterMode(display=False) as counter:
        products.run()
    assert counter.get_total_flops() == 2 * 4 * 5 * 3


@pytest.mark.parametrize("name", ["clock", "official"])
def test_the_page_shows_the_stored_ratios(name):
    result = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    page = (ROOT / "docs/performance.md").read_text()
    told = f"python -m benchmarks table --input benchmarks/results/{name}.json --write docs/performance.md"
    assert clock.inserted(page, clock.table(result), name) == page, told
    other = {**result, "rows": [{"what": "x", "skipped": "why"}]}
    assert "| x | why |" in clock.inserted(page, clock.table(other), name)


MODULES = {
    "tokenizer": lambda: TokenizerModule(TokenizerConfig(**TOKENIZER)),
    "checkpointed": lambda: TokenizerModule(TokenizerConfig(**TOKENIZER), activation_checkpointing=memory.PARTS),
    "ar": lambda: ARModule(ARConfig(**AR)),
}


@pytest.mark.parametrize("name", MODULES)
def test_counted_memory_is_what_a_real_step_keeps(name):
    counted = memory.count(MODULES[name], device="cpu")
    for batch_size in (3, 5):
        kept, flops = memory.forward(MODULES[name](), batch_size)
        expected = counted["activation_bytes_fixed"] + batch_size * counted["activation_bytes_per_sample"]
        assert kept == pytest.approx(expected, rel=0.01)
        assert flops == pytest.approx(batch_size * 1e9 * counted["forward_gflop_per_sample"], rel=0.01)


def test_counting_memory_needs_no_gpu():
    assert memory.count(lambda: ARModule(preset="B"))["parameters"] == 110_888_448
    assert not torch.is_autocast_enabled("cuda")


@pytest.mark.parametrize(
    ("leak", "late", "flat"),
    [(0, {}, True), (4000, {}, False), *((0, {name: 12}, False) for name in ("file_descriptors", "threads"))],
)
def test_what_a_soak_calls_flat(leak, late, flat):
    """Of 10,000 steps: memory rises at the start, is noisy, and leaks so many bytes a step."""
    generator, constant = np.random.default_rng(0), {"file_descriptors": 11, "threads": 2, "processes": 1}
    notes = []
    for step in range(50, 10_001, 50):
        used = 900 - 100 * np.exp(-step / 500) + generator.normal() + leak * step / 1e6
        notes.append({"step": step, "memory_mb": used} | constant | (late if step > 8000 else {}))
    found = soak.verdict(notes)
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


def test_a_benchmark_that_is_cut_keeps_its_finished_rows(tmp_path, capsys):
    def interrupted(bench) -> None:
        raise KeyboardInterrupt

    def run(**tests) -> None:
        rows = faults.outcomes(None, {name: (test,) for name, test in tests.items()}, 1)
        record(tmp_path / "faults.json", "faults", rows, key="fault")

    run(survived=lambda bench: "well", broken=lambda bench: {}["nothing"])
    assert "KeyError" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        run(broken=lambda bench: "mended", cut=interrupted)
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [(row["fault"], row["passed"]) for row in rows] == [("survived", True), ("broken", True)]


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_half_written(tmp_path):
    """One of the faults; the tests of resuming have more."""
    (row,) = faults.outcomes(faults.Bench(tmp_path, 6), {"kill": (faults.killed, "ar", 1)}, 1)
    assert row["passed"], row["outcome"]


def test_mutants_are_killed_by_tests_that_pass_without_them(tmp_path):
    (tmp_path / "thing.py").write_text("one = 1\ntwo = 2\n")
    (tmp_path / "test_x.py").write_text("from thing import one\n\n\ndef test():\n    assert one == 1\n")
    told = {"one = 1": "one =", "two = 2": "two = 3", " = ": ""}  # no Python; nothing looks at it; there twice
    found = [{"file": "thing.py", "old": old, "new": new, "tests": "test_x.py"} for old, new in told.items()]
    chosen = [mutant for mutant in found if mutants.applies(tmp_path, mutant)]
    assert len(chosen) == 2
    assert mutants.pytest(tmp_path, "test_x.py", 60) == 0
    assert [row["outcome"] for row in mutants.outcomes(tmp_path, chosen, 60)] == ["killed", "survived"]
    assert (tmp_path / "thing.py").read_text() == "one = 1\ntwo = 2\n"
