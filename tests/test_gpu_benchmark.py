"""`python -m benchmarks.gpu` without a GPU: the rehearsal of all items, crashes and cuts, and how rows are judged."""

import json
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused

from benchmarks import gpu, gpu_training, traffic
from benchmarks.gpu_bench import Bench


def test_the_rehearsal_runs_every_item(tmp_path):
    assert gpu.main(["--rehearse", "--output", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["item"] for row in rows} == {*gpu.ITEMS} == {*gpu.ORDER}
    judged = [row for row in rows if row["passed"] is not None]
    assert {row["item"] for row in judged} == {1, 4, 7, 8, 9, 10}  # what is right, not what is fast
    assert {row["road"] for row in rows if row["item"] == 7} == {"graph", "eager"}
    assert {row["value"] for row in judged if row["item"] == 7} == {1.0}
    table = (tmp_path / "gpu.md").read_text()
    assert all(row["what"] in table for row in rows)
    floors = [row for row in rows if row.get("floor")]
    assert {5, 6, 7, 8} <= {row["item"] for row in floors}
    assert all(row["ratio"] == row["value"] / row["floor"] for row in floors)
    assert {row["item"] for row in rows if row.get("kernels", 0) > 10} == {5, 6, 7, 8}


def test_a_crash_in_one_item_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    def broken(bench: Bench):
        yield bench.row("before", 1.0)
        raise RuntimeError("CUDA error")

    def well(bench: Bench):
        yield bench.row("after", 2.0, at_most=1.0, is_speed=False)

    monkeypatch.setattr(gpu, "ITEMS", {1: gpu.Item("one", broken, 1), 7: gpu.Item("two", well, 1)})
    assert gpu.main(["--rehearse", "--output", str(tmp_path), "--only", "1", "7"]) == 1
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["before", "crashed: RuntimeError: CUDA error", "after"]
    assert [row["passed"] for row in rows] == [None, False, False]
    assert "| 7 two | after | 2 |  |  | value <= 1 | FAILED |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "seconds", "told"),
    [
        ("pass", 30, []),
        ("print('Traceback\\n\\nthe last word', flush=True); os.abort()", 30, ["crashed with -6: the last word"]),
        ("time.sleep(60)", 1, ["cut after 1 s"]),
    ],
)
def test_rows_survive_the_process_that_wrote_them(program, seconds, told, tmp_path):
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log"
    write = f"import os, time; print('{{\"what\": \"first\"}}', file=open({str(rows)!r}, 'w'), flush=True); {program}"
    found = list(gpu.isolated([sys.executable, "-S", "-c", write], rows, log, seconds))
    assert [row["what"] for row in found] == ["first", *told]
    assert all(row["passed"] is False for row in found[1:])


def test_goals_are_of_the_ratio_where_there_is_a_floor():
    full, rehearsal = (Bench(torch.device("cpu"), full, Path()) for full in (True, False))
    assert full.row("x", 3.0, "ms", floor=2.0, at_most=1.6)["passed"]
    assert full.row("x", 3.0, "ms", floor=2.0, at_most=1.6) | {"ratio": 1.5, "goal": "ratio <= 1.6"} == full.row(
        "x", 3.0, "ms", floor=2.0, at_most=1.6
    )
    assert not full.row("x", 3.0, at_most=1.6)["passed"]
    assert full.row("x", 3.0, at_least=1.6)["passed"]
    assert full.row("x", 3.0, floor=2.0)["passed"] is None
    assert rehearsal.row("x", 3.0, floor=2.0, at_most=1.0)["passed"] is None
    assert rehearsal.row("x", 3.0, at_most=1.0, is_speed=False)["passed"] is False


def test_without_a_gpu_it_says_so(tmp_path):
    if not torch.cuda.is_available():
        refused("torch finds 0 cuda", gpu.main, ["--output", str(tmp_path)])
    refused(r"^only: 11 is no item, they are 1 to 10$", gpu.main, ["--output", str(tmp_path), "--only", "11"])


def test_goals_of_training_are_what_the_counted_traffic_allows(monkeypatch):
    """On an H100, as the page has it; 45% are above it."""
    bench = Bench(torch.device("cuda"), True, Path())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    allowed = {
        row["model"]: row["mfu_allowed"] for row in json.loads((traffic.RESULTS / "traffic.json").read_text())["rows"]
    }
    for name in gpu_training.FLOPS:
        assert gpu_training.FLOPS[name] == 1e9 * traffic.GFLOP[name]
        assert gpu_training.allowed_mfu(bench, name) == pytest.approx(allowed[name], rel=0.01)
        assert gpu_training.allowed_mfu(bench, name) < gpu_training.WISHED
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some other")
    assert gpu_training.allowed_mfu(bench, "v1") is None


def test_traffic_of_fused_kernels_is_what_they_read_and_write():
    """x to sin(2 x): one kernel forward, and one backward, which reads x and a gradient and writes one."""
    x = traffic.stream(1, 64, 32)
    kernels, size = traffic.compiled(lambda: (2 * x).sin())
    assert (kernels, size) == (2, (2 + 3) * x.nbytes)
    assert traffic.uncompiled(lambda: (2 * x).sin())[1] >= 10 * x.nbytes


def test_the_pages_show_the_stored_traffic():
    rows = json.loads((traffic.RESULTS / "traffic.json").read_text())["rows"]
    page = (traffic.RESULTS.parents[1] / "docs" / "performance.md").read_text()
    for row in rows:
        size = f"{row['gigabytes_outside_products']:.0f} GB"
        assert f"| {row['model']} at {row['batch']} | {size} | {row['mfu_allowed']:.0%} |" in page
    assert [row["model"] for row in rows] == ["v1", "XL", "B", "L"]
