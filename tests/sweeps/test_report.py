"""`dar report`: means and spreads are the library's, what is missing is named, nothing unlike is put together."""

import csv
import json
import statistics

import pytest
from PIL import Image
from tiny_sweep import GROUPS, ORDERS, PROTOCOL, RECONSTRUCTED, STEPS, measured, write_json, write_sweep

from dar_lightning.cli import main
from dar_lightning.sweeps.curves import read_scalars
from dar_lightning.sweeps.plots import plot_curves, plot_groups, plot_metrics, plot_samples
from dar_lightning.sweeps.results import read_sweep
from dar_lightning.sweeps.tables import markdown, summarize

CODE = {"version": "0.1.0", "commit": "0123456789abcdef", "changed": False, "sha256": "f" * 64}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def reported(sweep, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    main(["report", str(sweep), "--output", str(output)])
    return output


def lines(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


def edit(path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def test_mean_and_spread_over_seeds(reported):
    found = {(line["cell"], line["figure"]): line for line in lines(reported / "table.csv")}
    for order, count in {"coarse": 3, "reversed": 3, "random": 1}.items():
        values = [measured(order, seed) for seed in range(count)]
        line = found[order, "FD-color_edges"]
        assert float(line["mean"]) == pytest.approx(statistics.mean(values))
        assert line["n"] == str(count)
        assert line["std"] == "" if count == 1 else float(line["std"]) == pytest.approx(statistics.stdev(values))
        assert float(found[order, "val/loss"]["mean"]) == pytest.approx(ORDERS[order] + 0.1 * (count - 1) / 2)
    assert (line["failed"], line["pending"]) == ("1", "1")
    assert found["reversed", "gFID"]["source"] == "paper"
    assert not any(line["figure"] == "psnr" for line in found.values()), "infinite"


def test_every_run_has_a_line(reported):
    found = [(line["cell"], line["seed"], line["status"], line["value"]) for line in lines(reported / "runs.csv")]
    assert len(found) == 2 * 7 + 2
    expected = {("reversed", "2", "done", str(measured("reversed", 2))), ("random", "1", "failed", "")}
    assert expected | {("random", "2", "pending", "")} <= {*found}


def test_the_table_has_the_paper_beside_it_and_names_what_is_missing(reported):
    text = (reported / "table.md").read_text()
    for part in (
        "| order | runs | FD-color_edges | paper: gFID |\n|---|---|---|---|\n| coarse | 3 | 0.11 ± 0.01 | 2.44 |",
        "| random | 1 of 3 (1 failed, 1 pending) | 0.12 |  |",
        "Runs: 7 done, 1 failed, 1 pending.",
        "Failed: random seed 1 (ar)",
        "Pending: random seed 2",
        "Budget: 30 steps of 4 images",
        "Measured: 28 images, 207 of reference, features color_edges.",
        "Measured: 207 reconstructions.",
        "Not comparable with the paper's numbers",
    ):
        assert part in text


def test_shared_work_counts_once_and_code_is_named(tmp_path):
    write_sweep(tmp_path)
    for seed, changes in enumerate(({}, {"commit": None, "changed": None}, None)):
        folder = tmp_path / "cells" / "coarse" / f"seed{seed}"
        told = json.loads((folder / "metrics.json").read_text())
        figures = told["figures"] | {"psnr": 12.5, "rFD": 1.5}
        edit(folder / "metrics.json", figures=figures, stages={"psnr": "tokenizer", "rFD": "ar", "val/loss": "ar"})
        stages = json.loads((folder / "cell.json").read_text())["stages"]
        if changes is not None:
            stages[0]["code"] = CODE | changes
        edit(folder / "cell.json", stages=stages)
    sweep = read_sweep(tmp_path)
    found = {row.metric: row for row in summarize(sweep) if row.cell.name == "coarse"}
    assert (str(found["psnr"]), found["psnr"].std, len(found["psnr"].values)) == ("12.5", None, 1), "one tokenizer"
    assert str(found["rFD"]) == "1.5 ± 0", "three trainings, which agree"
    assert len(found["val/loss"].values) == 3
    one, other = "dar_lightning 0.1.0, commit 0123456789ab (package ffffffff)", "dar_lightning 0.1.0 (package ffffffff)"
    assert f"Made by {one}; code that was not noted; {other}.  \n" in markdown(sweep, [])


def test_plots_show_the_numbers(sweep, reported):
    found = read_sweep(sweep)
    here, paper = plot_metrics(found, summarize(found)).axes
    means = [bars.lines[0].get_ydata()[i] for bars in here.containers for i in range(3)]
    assert means == pytest.approx([0.11, 0.16, 0.12])
    assert paper.containers[0].lines[0].get_ydata() == pytest.approx([2.44, 4.17])
    [curves] = plot_curves(found).axes
    thick = {line.get_label(): line for line in curves.lines if line.get_linewidth() == 2}
    assert list(thick) == ["order coarse (n = 3)", "order reversed (n = 3)", "order random (n = 1)"]
    line = thick["order reversed (n = 3)"]
    assert line.get_xdata().tolist() == list(STEPS)
    assert line.get_ydata() == pytest.approx([3.6, 2.6, 1.6])
    groups, written = plot_groups(found).axes
    assert (groups.get_title(), written.get_title()) == ("ar: groups/val_loss", "ar: written/val_loss")
    assert groups.containers[0].lines[0].get_ydata() == pytest.approx([1.1 - k / 10 for k in range(GROUPS)])
    samples = plot_samples(found).axes
    assert [axes.get_title(loc="left") for axes in samples] == [f"order {order}, seed 0" for order in ORDERS]
    assert [axes.images[0].get_array()[0, 0].tolist() for axes in samples] == [[60 * i, 0, 200] for i in range(3)]
    for name in ("figures.png", "curves.png", "groups.png", "samples.jpg"):
        with Image.open(reported / name) as image:
            assert min(image.size) > 90


def test_a_plot_has_no_place_for_cells_of_which_nothing_is_known(sweep):
    found = read_sweep(sweep)
    axes = plot_metrics(found, [row for row in summarize(found) if row.cell.name != "coarse"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["reversed", "random"]
    assert axes.containers[0].lines[0].get_xdata().tolist() == [0, 1]


def test_of_a_large_grid_the_first_images_are_shown(tmp_path):
    write_sweep(tmp_path)
    Image.new("RGB", (2000, 2000)).save(tmp_path / "cells/coarse/seed0/samples.png")
    assert plot_samples(read_sweep(tmp_path)).axes[0].images[0].get_array().shape == (920, 660, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": PROTOCOL | {"reference": {"n": 50}}}, "measure's protocols differ in reference.n: 207, 50"),
        ({"measure": PROTOCOL | {"samples": {"n": 27}}}, "measure's protocols differ in samples.n: 28, 27"),
        ({"reconstruct": {"num_images": 207}}, "reconstruct's protocols differ in reference.crop: centre 64, None"),
        ({"reconstruct": RECONSTRUCTED | {"psnr": "x"}}, "differ in reconstruction.psnr: None, x"),
    ],
)
def test_unlike_protocols_are_refused(change, message, tmp_path, capsys):
    path = write_sweep(tmp_path) / "cells" / "reversed" / "seed1" / "metrics.json"
    edit(path, protocol=json.loads(path.read_text())["protocol"] | change)
    assert message in mistake(tmp_path, capsys)
    assert not (tmp_path / "report").exists()


def mistake(folder, capsys) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(folder)])
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_other_mistakes(tmp_path, capsys):
    assert "has no sweep.json: give a folder that dar sweep wrote" in mistake(tmp_path, capsys)
    write_sweep(tmp_path)
    (tmp_path / "cells" / "coarse" / "seed0" / "metrics.json").unlink()
    assert "metrics.json is missing, but the run is done" in mistake(tmp_path, capsys)
    write_json(tmp_path / "cells" / "coarse" / "seed0" / "cell.json", {"status": "lost", "stages": []})
    assert "status is 'lost': it must be done, failed, pending" in mistake(tmp_path, capsys)
    write_json(tmp_path / "sweep.json", {"name": "x", "cells": []})
    assert "is not what dar sweep writes: KeyError('axes')" in mistake(tmp_path, capsys)


def test_nothing_done_yet(tmp_path, capsys):
    for path in (write_sweep(tmp_path) / "cells").rglob("cell.json"):
        path.unlink()
    main(["report", str(tmp_path)])
    assert "| coarse | 0 of 3 (3 pending) |  | 2.44 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"table.csv", "table.md", "runs.csv"}


def test_a_resumed_runs_curve_is_one_curve(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for start, offset in ((0, 0.0), (2, 10.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{start}") as writer:
            for step in range(start, start + 3):
                writer.add_scalar("x", step + offset, step)
    curve = read_scalars(tmp_path)["x"]
    assert curve.steps.tolist() == [0, 1, 2, 3, 4]
    assert curve.values.tolist() == [0, 1, 12, 13, 14]
