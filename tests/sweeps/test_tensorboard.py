"""What TensorBoard's own readers find in a reported sweep."""

import io
from dataclasses import replace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tiny_sweep import GROUPS, measured, write_sweep

from dar_lightning.sweeps.results import read_sweep
from dar_lightning.sweeps.tensorboard import write_tensorboard


def read(folder) -> EventMultiplexer:
    return EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    sweep = read_sweep(write_sweep(tmp_path_factory.mktemp("sweep")))
    write_tensorboard(sweep)
    return read(write_tensorboard(sweep))  # a second report takes the first one's place


def hyperparameters(tags: dict) -> dict:
    return metadata.parse_session_start_info_plugin_data(tags[metadata.SESSION_START_INFO_TAG]).hparams


def test_runs_bear_the_names_of_their_cells(runs):
    names = {name for name in runs.Runs() if name.startswith("random")}
    assert names == {"random/seed0", "random/seed0/ar", "random/seed0/tokenizer"}
    events = runs.Scalars("reversed/seed1/ar", "val/loss")
    assert [event.step for event in events] == [10, 20, 30]
    assert events[-1].value == pytest.approx(1.6)
    [event] = runs.Images("reversed/seed1", "samples")
    assert Image.open(io.BytesIO(event.encoded_image_string)).getpixel((5, 5)) == (60, 40, 200)


def test_each_run_is_one_row_of_the_table(runs, tmp_path):
    started = runs.PluginRunToTagToContent("hparams")
    done = {f"{cell}/seed{seed}" for cell in ("coarse", "reversed") for seed in range(3)} | {"random/seed0"}
    assert set(started) == done, "and none for what Lightning logs of a training"
    tags = started["reversed/seed1"]
    found = hyperparameters(tags)
    assert (found["order"].string_value, found["seed"].number_value) == ("reversed", 1)
    experiment = metadata.parse_experiment_plugin_data(tags[metadata.EXPERIMENT_TAG])
    assert [metric.name.tag for metric in experiment.metric_infos] == ["measured/FD-color_edges"]
    [event] = runs.Scalars("reversed/seed1", "measured/FD-color_edges")
    assert event.value == pytest.approx(measured("reversed", 1))

    sweep = read_sweep(write_sweep(tmp_path))
    values = {"K": 16, "beta": 0.5, "low_rank": True, "quantizer": "vq", "guidance": [1.1, 8.0]}
    cell = replace(sweep.cells[0], values=values)
    tags = read(write_tensorboard(replace(sweep, cells=(cell,)))).PluginRunToTagToContent("hparams")
    found = hyperparameters(tags[f"{cell.name}/seed0"])
    assert (found["K"].number_value, found["beta"].number_value) == (16, 0.5), "numbers are sorted as such"
    texts = [found[axis].string_value for axis in ("low_rank", "quantizer", "guidance")]
    assert texts == ["True", "vq", "1.1, 8"]


def test_the_layout_puts_curves_of_all_cells_into_one_chart(runs):
    [event] = runs.Tensors(".", "custom_scalars__config__")
    found = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category
    }
    groups = [f"groups/val_loss_{k}" for k in range(GROUPS)]
    written = [f"written/val_loss_{k}" for k in range(GROUPS)]
    expected = {"Does order matter?": ["val/loss", "val/flow", *groups], "written/val_loss": written}
    assert found == {title: {name: [f"^{name}$"] for name in names} for title, names in expected.items()}
