"""`dar report`: means and spreads are the library's, what is missing is named, nothing unlike is put together."""

import csv
import json
import statistics

import numpy as np
import pytest
from PIL import Image
from tiny_sweep import GROUPS, ORDERS, PROTOCOL, STEPS, measured, write_json, write_sweep

from dar_lightning.cli import main
from dar_lightning.sweeps.curves import read_scalars
from dar_lightning.sweeps.plots import plot_curves, plot_figures, plot_groups, samples_side_by_side
from dar_lightning.sweeps.results import read_sweep
from dar_lightning.sweeps.tables import summarize


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


def test_mean_and_spread_over_seeds(reported):
    found = {(line["cell"], line["figure"]): line for line in lines(reported / "table.csv")}
    for order, count in {"coarse": 3, "reversed": 3, "random": 1}.items():
        values = [measured(order, seed) for seed in range(count)]
        line = found[order, "FD-color_edges"]
        assert float(line["mean"]) == pytest.approx(statistics.mean(values))
        assert line["n"] == str(count)
        if count > 1:
            assert float(line["std"]) == pytest.approx(statistics.stdev(values))
        last = found[order, "val/loss"]
        assert float(last["mean"]) == pytest.approx(ORDERS[order] + 0.1 * (count - 1) / 2)
    line = found["random", "FD-color_edges"]
    assert (line["std"], line["failed"], line["pending"]) == ("", "1", "1")
    assert found["reversed", "gFID"]["source"] == "paper"
    assert not any(line["figure"] == "psnr" for line in found.values()), "infinite"


def test_runs_that_share_what_was_measured_count_once(tmp_path, capsys):
    write_sweep(tmp_path)
    for seed in range(3):
        path = tmp_path / "cells" / "coarse" / f"seed{seed}" / "metrics.json"
        told = json.loads(path.read_text())
        told["figures"] |= {"psnr": 12.5, "rFD": 1.5}
        write_json(path, told | {"stages": {"psnr": "tokenizer", "rFD": "ar", "val/loss": "ar"}})
    found = {row.figure: row for row in summarize(read_sweep(tmp_path)) if row.cell.name == "coarse"}
    assert (str(found["psnr"]), found["psnr"].std, len(found["psnr"].values)) == ("12.5", None, 1), "one tokenizer"
    assert str(found["rFD"]) == "1.5 ± 0", "three trainings, which agree"
    assert len(found["val/loss"].values) == 3
    main(["report", str(tmp_path)])
    [line] = [line for line in lines(tmp_path / "report/table.csv") if line["figure"] == "psnr"]
    assert (line["mean"], line["std"], line["n"]) == ("12.5", "", "1")


def test_every_run_has_a_line(reported):
    found = [(line["cell"], line["seed"], line["status"], line["value"]) for line in lines(reported / "runs.csv")]
    assert len(found) == 2 * 7 + 2
    assert ("reversed", "2", "done", str(measured("reversed", 2))) in found
    assert ("random", "1", "failed", "") in found
    assert ("random", "2", "pending", "") in found


def test_the_table_has_the_paper_beside_it_and_names_what_is_missing(reported):
    text = (reported / "table.md").read_text()
    assert "| order | runs | FD-color_edges | paper: gFID |" in text
    assert "| coarse | 3 | 0.11 ± 0.01 | 2.44 |" in text
    assert "| random | 1 of 3 (1 failed, 1 pending) | 0.12 |  |" in text
    assert "Runs: 7 done, 1 failed, 1 pending." in text
    assert "Failed: random seed 1 (ar)" in text
    assert "Pending: random seed 2" in text
    assert "Budget: 30 steps of 4 images" in text
    assert "Measured: 28 images, 207 of reference, features color_edges." in text
    assert "Measured: 207 reconstructions." in text
    assert "Not comparable with the paper's figures" in text


def test_the_table_says_which_code_made_it(tmp_path):
    write_sweep(tmp_path)
    code = {"version": "0.1.0", "commit": "0123456789abcdef", "changed": False, "sha256": "f" * 64}
    for seed, changes in enumerate(({}, {"commit": None, "changed": None})):
        path = tmp_path / "cells" / "coarse" / f"seed{seed}" / "cell.json"
        told = json.loads(path.read_text())
        told["stages"][0]["code"] = code | changes
        write_json(path, told)
    main(["report", str(tmp_path)])
    text = (tmp_path / "report" / "table.md").read_text()
    one, other = "dar_lightning 0.1.0, commit 0123456789ab (package ffffffff)", "dar_lightning 0.1.0 (package ffffffff)"
    assert f"Made by {one}; code that was not noted; {other}.  \n" in text


def test_plots_show_the_numbers(sweep, reported):
    found = read_sweep(sweep)
    here, paper = plot_figures(found, summarize(found)).axes
    means = [bars.lines[0].get_ydata()[i] for bars in here.containers for i in range(3)]
    assert means == pytest.approx([0.11, 0.16, 0.12])
    assert paper.containers[0].lines[0].get_ydata() == pytest.approx([2.44, 4.17])
    [curves] = plot_curves(found).axes
    thick = [line for line in curves.lines if line.get_linewidth() == 2]
    assert [line.get_label() for line in thick] == [
        "order coarse (n = 3)",
        "order reversed (n = 3)",
        "order random (n = 1)",
    ]
    assert thick[1].get_xdata().tolist() == list(STEPS)
    assert thick[1].get_ydata() == pytest.approx([3.6, 2.6, 1.6])
    groups, written = plot_groups(found).axes
    assert (groups.get_title(), written.get_title()) == ("ar: groups/val_loss", "ar: written/val_loss")
    assert groups.containers[0].lines[0].get_ydata() == pytest.approx([1.1 - k / 10 for k in range(GROUPS)])
    for name in ("figures", "curves", "groups"):
        with Image.open(reported / f"{name}.png") as image:
            assert min(image.size) > 300


def test_samples_stand_side_by_side(reported):
    with Image.open(reported / "samples.jpg") as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape[:2] == (6 + 20 + 64 + 6, 6 + 3 * (128 + 6)), "256x128 at half size, under their names"
    middles = [pixels[6 + 20 + 32, 6 + 134 * i + 64] for i in range(3)]
    expected = [(60 * i, 0, 200) for i in range(3)]
    assert np.abs(np.array(middles) - expected).max() < 8


def test_of_a_large_grid_the_first_images_are_shown(tmp_path):
    write_sweep(tmp_path)
    grid = np.zeros((2000, 2000, 3), np.uint8)
    grid[:920, :660] = (0, 200, 0)
    for path in tmp_path.glob("cells/*/*/samples.png"):
        Image.fromarray(grid).save(path)
    pixels = np.asarray(samples_side_by_side(read_sweep(tmp_path)))[26:, 6:]
    assert (pixels[:460, :330] == (0, 200, 0)).all(), "each pixel is the mean of four"
    assert (pixels[460:, :330] == 255).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"measure": PROTOCOL | {"reference": {"n": 50}}},
            "compared, measure's protocols differ in reference.n: 207, 50",
        ),
        ({"measure": PROTOCOL | {"samples": {"n": 27}}}, "differ in samples.n: 28, 27"),
        ({"reconstruct": {"num_images": 206}}, "reconstruct's protocols differ in crop: centre 64, None"),
    ],
)
def test_unlike_protocols_are_refused(change, message, tmp_path, capsys):
    write_sweep(tmp_path)
    path = tmp_path / "cells" / "reversed" / "seed1" / "metrics.json"
    protocol = json.loads(path.read_text())["protocol"] | change
    write_json(path, json.loads(path.read_text()) | {"protocol": protocol})
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
    write_sweep(tmp_path)
    for path in (tmp_path / "cells").rglob("cell.json"):
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
