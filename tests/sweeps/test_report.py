"""`dar report`: means and spreads are the library's, what is missing is named, nothing unlike is put together."""

import csv
import io
import json
import shlex
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from refusals import refusal, refused
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tiny_sweep import GROUPS, MEASURED, ORDERS, RECONSTRUCTED, STEPS, measured, write_json, write_sweep
from torch.utils.tensorboard import SummaryWriter

from dar_lightning.cli import main
from dar_lightning.sweeps.curves import read_scalars
from dar_lightning.sweeps.plots import plot_curves, plot_groups, plot_metrics, plot_samples
from dar_lightning.sweeps.results import read_sweep
from dar_lightning.sweeps.tables import markdown, summarize
from dar_lightning.sweeps.tensorboard import write_tensorboard

CODE = {"version": "0.1.0", "commit": "0123456789abcdef", "changed": True, "sha256": "f" * 64}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def reported(sweep, tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    main(["report", str(sweep), "--output", str(output)])
    return output


@pytest.fixture
def copy(sweep, tmp_path):
    return shutil.copytree(sweep, tmp_path / "a copy")


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
    runs = [(line["cell"], line["seed"], line["status"], line["value"]) for line in lines(reported / "runs.csv")]
    assert len(runs) == 2 * 7 + 2
    expected = {("reversed", "2", "done", str(measured("reversed", 2))), ("random", "1", "failed", "")}
    assert expected | {("random", "2", "pending", "")} <= {*runs}


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


def test_shared_work_counts_once_and_code_is_named(copy):
    for seed, changes in enumerate(({}, {"commit": None, "changed": None}, None)):
        folder = copy / f"cells/coarse/seed{seed}"
        told = json.loads((folder / "metrics.json").read_text())
        figures, stages = told["figures"] | {"psnr": 12.5, "rFD": 1.5}, told["stages"] | {"psnr": "tokenizer"}
        edit(folder / "metrics.json", figures=figures, stages=stages | {"rFD": "ar"})
        stages = json.loads((folder / "cell.json").read_text())["stages"]
        stages[0] |= {} if changes is None else {"code": CODE | changes}
        edit(folder / "cell.json", stages=stages)
    sweep = read_sweep(copy)
    rows = summarize(sweep)
    found = {row.metric: row for row in rows if row.cell.name == "coarse"}
    assert (found["psnr"].values, found["psnr"].std) == ((12.5,), None), "one tokenizer"
    assert (found["rFD"].values, found["rFD"].std) == (3 * (1.5,), 0), "three trainings, which agree"
    one = "dar_lightning 0.1.0, commit 0123456789ab with changes (package ffffffff)"
    other = "dar_lightning 0.1.0 (package ffffffff)"
    text = markdown(replace(sweep, metrics=("psnr", "rFD")), rows)
    assert f"Made by {one}; code that was not noted; {other}.  \n" in text
    assert "| coarse | 3 | 12.5 | 1.5 ± 0 |" in text


def test_plots_show_the_numbers(sweep, reported):
    found = read_sweep(sweep)
    rows = summarize(found)
    for figure in (plot_metrics(found, rows), plot_curves(found), plot_groups(found)):
        assert figure.get_suptitle() == "Does order matter?"
    here, paper = plot_metrics(found, rows).axes
    means = [bars.lines[0].get_ydata()[i] for bars in here.containers for i in range(3)]
    assert means == pytest.approx([0.11, 0.16, 0.12])
    assert paper.containers[0].lines[0].get_ydata() == pytest.approx([2.44, 4.17])
    axes = plot_metrics(found, [row for row in rows if row.cell.name != "coarse"]).axes[0]
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["reversed", "random"], "no place for what is unknown"
    assert axes.containers[0].lines[0].get_xdata().tolist() == [0, 1]
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
    arrays = [axes.images[0].get_array() for axes in samples]
    assert [array[0, 0].tolist() for array in arrays] == [[60 * i, 0, 200] for i in range(3)]
    assert arrays[2].shape == (920, 660, 3), "of a large grid, the first images"
    for name in ("figures.png", "curves.png", "groups.png", "samples.jpg"):
        with Image.open(reported / name) as image:
            assert min(image.size) > 90


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure": MEASURED | {"reference": {"n": 50}}}, "measure's protocols differ in reference.n: 207, 50"),
        ({"measure": MEASURED | {"samples": {"n": 27}}}, "measure's protocols differ in samples.n: 28, 27"),
        ({"reconstruct": RECONSTRUCTED | {"reconstruction": {"psnr": "x"}}}, "differ in reconstruction.psnr: mean, x"),
    ],
)
def test_unlike_protocols_are_refused(change, message, copy):
    path = copy / "cells/reversed/seed1/metrics.json"
    protocol = json.loads(path.read_text())["protocol"]
    edit(path, protocol=protocol | {stage: protocol[stage] | values for stage, values in change.items()})
    refused(message, read_sweep, copy)


def test_mistakes_are_one_line(tmp_path, capsys):
    write_json(tmp_path / "other/sweep.json", {"name": "x", "cells": []})
    for folder, says in (
        (tmp_path, "has no sweep.json: give a folder that dar sweep wrote"),
        (tmp_path / "other", "is not what dar sweep writes: KeyError('title')"),
    ):
        assert says in refusal(capsys, ["report", folder])


def test_nothing_done_yet(copy, capsys):
    (copy / "cells/coarse/seed0/metrics.json").unlink()
    assert [run.status for run in read_sweep(copy).cells[0].runs] == ["pending", "done", "done"], "killed in between"
    for path in (copy / "cells").rglob("cell.json"):
        path.unlink()
    main(["report", str(copy)])
    said = capsys.readouterr().out
    assert "| coarse | 0 of 3 (3 pending) |  | 2.44 |" in said
    (logs,) = shlex.split(said.splitlines()[-1].rpartition("tensorboard --logdir ")[2])
    assert Path(logs).is_dir(), "also where its name has a space"
    assert {path.name for path in (copy / "report").iterdir()} == {"table.csv", "table.md", "runs.csv"}


def test_a_resumed_runs_curve_is_one_curve(tmp_path):
    for start, offset in ((0, 0.0), (2, 10.0)):
        with SummaryWriter(str(tmp_path), filename_suffix=f".{start}") as writer:
            for step in range(start, start + 3):
                writer.add_scalar("x", step + offset, step)
    curve = read_scalars(tmp_path)["x"]
    assert curve.steps.tolist() == [0, 1, 2, 3, 4]
    assert curve.values.tolist() == [0, 1, 12, 13, 14]


def loaded(folder) -> EventMultiplexer:
    return EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()


def hyperparameters(tags: dict) -> dict:
    return metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG]).hparams


@pytest.fixture(scope="module")
def board(sweep, reported):
    return loaded(write_tensorboard(read_sweep(sweep)))  # a second report takes the first one's place


def test_runs_bear_the_names_of_their_cells(board):
    names = {name for name in board.Runs() if name.startswith("random")}
    assert names == {"random/seed0", "random/seed0/ar", "random/seed0/tokenizer"}
    events = board.Scalars("reversed/seed1/ar", "val/loss")
    assert [(event.step, round(event.value, 5)) for event in events] == [(10, 3.6), (20, 2.6), (30, 1.6)]
    [event] = board.Images("reversed/seed1", "samples")
    assert Image.open(io.BytesIO(event.encoded_image_string)).getpixel((5, 5)) == (60, 40, 200)


def test_each_run_is_one_row_of_the_table(board, sweep, tmp_path):
    started = board.PluginRunToTagToContent("hparams")
    done = {f"{cell}/seed{seed}" for cell in ("coarse", "reversed") for seed in range(3)} | {"random/seed0"}
    assert set(started) == done, "and none for what Lightning logs of a training"
    tags = started["reversed/seed1"]
    found = hyperparameters(tags)
    assert (found["order"].string_value, found["seed"].number_value) == ("reversed", 1)
    experiment = metadata.parse_experiment_plugin_data(tags[metadata.EXPERIMENT_TAG])
    assert [metric.name.tag for metric in experiment.metric_infos] == ["measured/FD-color_edges"]
    [event] = board.Scalars("reversed/seed1", "measured/FD-color_edges")
    assert event.value == pytest.approx(measured("reversed", 1))

    values = {"K": 16, "beta": 0.5, "low_rank": True, "quantizer": "vq", "guidance": [1.1, 8.0]}
    cell = replace(read_sweep(sweep).cells[0], values=values)
    only = replace(read_sweep(sweep), folder=tmp_path, cells=(cell,))
    found = hyperparameters(loaded(write_tensorboard(only)).PluginRunToTagToContent("hparams")[f"{cell.name}/seed0"])
    assert (found["K"].number_value, found["beta"].number_value) == (16, 0.5), "numbers are sorted as such"
    texts = [found[axis].string_value for axis in ("low_rank", "quantizer", "guidance")]
    assert texts == ["True", "vq", "1.1, 8"]


def test_the_layout_puts_curves_of_all_cells_into_one_chart(board):
    [event] = board.Tensors(".", "custom_scalars__config__")
    found = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    }
    groups = [f"groups/val_loss_{k}" for k in range(GROUPS)]
    written = [f"written/val_loss_{k}" for k in range(GROUPS)]
    expected = {"Does order matter?": ["val/loss", "val/flow", *groups], "written/val_loss": written}
    assert found == {title: {name: [f"^{name}$"] for name in names} for title, names in expected.items()}
