"""The benchmark commands at their smallest: rows, ratios, another revision, precision, editing, GPUs."""

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
from refusals import refused
from tiny_models import AR, TOKENIZER, make_pipeline
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import clock, faults, gpu, gpu_training, measure, memory, mutants, official, soak, traffic
from benchmarks.__main__ import main
from benchmarks.editing import correlation, holes, psnr, seam
from benchmarks.gpu_bench import Bench
from benchmarks.machine import record
from benchmarks.precision import TF32, compare, round_to_tf32
from benchmarks.rows import ROWS, Setting
from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.ar.sampling import generate
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer
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
    refused(r"^sizes XL: encode have none of them$", main, ["--rows", "encode", "--sizes", "XL"])
    refused(r"^rows: guided is none of encode, decode, ", main, ["rows", "--rows", "guided"])


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
    program = f"import json, sys\nrow = {row}\nrow['latency_seconds'] = float(open('dar_lightning/x').read())\n"
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
    skipped = [name for name, row in rows.items() if "skipped" in row]
    assert skipped == ["decode_compiled", "ar_training_compiled"]
    assert all(0 < row["products_share"] < 1 for name, row in rows.items() if name not in [*skipped, "dispatch"])


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


def test_rounding_keeps_ten_bits_of_mantissa():
    step = 2.0**-10
    x = torch.tensor([1, 1 + step, 1 + step / 2, 1 + 3 * step / 2, 1 + 0.51 * step, -3 - 1.9 * step, 0.1, 2.0**-20])
    expected = [1, 1 + step, 1, 1 + 2 * step, 1 + step, -3 - 2 * step, 1638 / 16384, 2.0**-20]
    assert round_to_tf32(x).tolist() == expected
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mantissa, exponent = np.frexp(values.double().numpy())
    by_numpy = np.ldexp(np.round(mantissa * 2.0**11), exponent - 11)
    assert np.array_equal(round_to_tf32(values).double().numpy(), by_numpy)
    assert round_to_tf32(values.bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("product", [F.linear, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__])
def test_factors_are_rounded_and_what_is_added_is_not(product):
    generator = torch.Generator().manual_seed(0)
    shapes = {F.linear: ((4, 16), (8, 16)), F.conv2d: ((2, 3, 8, 8), (5, 3, 4, 4)), torch.bmm: ((2, 3, 4), (2, 4, 5))}
    x, weight = (torch.randn(shape, generator=generator) for shape in shapes.get(product, ((3, 4), (4, 5))))
    bias = [torch.randn(len(weight), generator=generator)] if product in (F.linear, F.conv2d) else []
    rounded = [round_to_tf32(factor).double() for factor in (x, weight)]
    expected = product(*rounded, *(each.double() for each in bias)).float()
    with TF32():
        found = product(x, weight, *bias)
        torch.set_float32_matmul_precision("highest")
        unchanged = product(x, weight, *bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert (found - unchanged).abs().max() > 1e-4, "rounding shows"
    assert torch.equal(unchanged, product(x, weight, *bias)), "without permission nothing is rounded"


@pytest.mark.usefixtures("allowed")
def test_a_layer_is_caught_and_attention_and_the_search_for_codes_left_exact():
    torch.manual_seed(0)
    layer, x, (q, k, v) = nn.Linear(16, 8), torch.randn(4, 16), torch.randn(3, 2, 4, 5, 8)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    quantizer, latents = VectorQuantizer(1024, 8), torch.randn(32, 256, 8)
    quantizer.codebook.data = F.normalize(torch.randn(1024, 8), dim=-1)
    products = F.normalize(latents.double(), dim=-1) @ quantizer.codebook.double().T
    with TF32(), torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), exact)
        rounded = (F.normalize(latents, dim=-1) @ quantizer.codebook.T).argmax(dim=-1)
        found = quantizer.nearest(latents)
    assert not torch.equal(layer(x), F.linear(round_to_tf32(x), round_to_tf32(layer.weight), layer.bias))
    assert (rounded != products.argmax(dim=-1)).sum() > 10
    assert (found != products.argmax(dim=-1)).sum() <= 1, "two codes may be equally near"


def test_figures():
    pipe = make_pipeline()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = compare(pipe, images, torch.tensor([0, 1, 2]))
    assert (found["images"], found["weights_stored_in"]) == (3, "float32")
    half = make_pipeline().to(torch.bfloat16).tokenizer.tokenize(images)
    agree = (half == make_pipeline().tokenizer.tokenize(images)).double().mean().item()
    assert found["bfloat16"]["codes_agree"] == agree
    for name in ("logits_error", "pixels_error"):
        assert 0 < found["tf32"][name] < found["bfloat16"][name] < 0.1
    assert all(0 < found[name]["pixels_of_8_bits_agree"] <= 1 for name in ("tf32", "bfloat16"))


def test_figures_have_the_values_of_simple_images():
    known = holes(64)["center"][0]
    assert [parts[0].float().mean().item() for parts in holes(64).values()] == [0.75, 0.5, 0.25]
    noise = 0.2 * torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam(noise, known) == pytest.approx(1, abs=0.02)
    ramp = torch.arange(64.0).expand(1, 3, 64, 64) / 10
    step = ramp + 0.4 * ~known  # only pairs from left to right differ, by 0.1; across the border by 0.5 or 0.3
    # across: 32 rows at each side, and at the upper and lower border 32 columns each with 0.4
    across, off = (32 * 0.5 + 32 * 0.3 + 64 * 0.4) / 128, 0.1 / 2
    assert seam(step, known) == pytest.approx(across / off, abs=0.01)
    assert psnr(noise.clamp(-1, 1) + 0.0, noise, known) > 40
    assert psnr(torch.full((2, 3, 64, 64), 0.2), torch.zeros(2, 3, 64, 64)) == 20.0
    assert psnr(torch.zeros(2, 3, 64, 64).where(known, 0.2), torch.zeros(2, 3, 64, 64), ~known) == 20.0
    smooth = torch.nn.functional.interpolate(noise[:4, :, ::8, ::8], size=64)
    assert correlation(smooth, smooth) == 1.0
    assert correlation(-smooth, smooth) == -1.0


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
    row = full.row("x", 3.0, "ms", floor=2.0, at_most=1.6)
    assert (row["passed"], row["ratio"], row["goal"]) == (True, 1.5, "ratio <= 1.6")
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
    rows = json.loads((traffic.RESULTS / "traffic.json").read_text())["rows"]
    allowed = {row["model"]: row["mfu_allowed"] for row in rows}
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
