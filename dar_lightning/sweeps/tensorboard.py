"""A sweep in TensorBoard: every run under its cell's name, an hparams table, and the study's curves side by side."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dar_lightning.sweeps.curves import EVENTS
from dar_lightning.sweeps.results import SAMPLES, SweepResult
from dar_lightning.sweeps.tables import CURVES, GROUPS, is_number, value_text

FOLDER = "tensorboard"


def write_tensorboard(sweep: SweepResult) -> Path:
    """Write `tensorboard/` in the sweep's folder, in the place of an earlier one.

    - `CELL/seedS`: the run's axes and seed as hyperparameters, its metrics (the HPARAMS tab), and its
      samples, which are of the same classes and noise in every cell.
    - `CELL/seedS/STAGE`: what the stage logged, pictures too, under the cell's name.
    - the root: a layout for the CUSTOM SCALARS tab, with the curves of all cells in one chart each.
    """
    root, part = sweep.folder / FOLDER, sweep.folder / f".{FOLDER}.part"
    shutil.rmtree(part, ignore_errors=True)
    for cell in sweep.cells:
        for run in cell.having("done"):
            place = part / cell.name / f"seed{run.seed}"
            shown = sweep.metrics or run.metrics
            metrics = {f"measured/{name}": run.metrics[name] for name in shown if name in run.metrics}
            # Numbers as such, by which the table sorts, all else as text.
            settings = {axis: value if is_number(value) else value_text(value) for axis, value in cell.values.items()}
            with SummaryWriter(str(place)) as writer:
                # add_hparams puts them into a folder named for the time
                for summary in hparams(settings | {"seed": run.seed}, metrics):
                    writer.file_writer.add_summary(summary)
                for name, value in metrics.items():
                    writer.add_scalar(name, value, 0)
                if (run.folder / SAMPLES).is_file():
                    with Image.open(run.folder / SAMPLES) as image:
                        writer.add_image("samples", np.asarray(image.convert("RGB")), dataformats="HWC")
            for stage in run.stages:
                _copy_events(stage.folder, place / stage.name)
    with SummaryWriter(str(part)) as writer:
        writer.add_custom_scalars(_layout(sweep))
    shutil.rmtree(root, ignore_errors=True)
    part.rename(root)
    return root


def _copy_events(source: Path, folder: Path) -> None:
    """All events but the hyperparameters that Lightning logs: they would be rows of the sweep's own table."""
    files = sorted(source.rglob(EVENTS), key=lambda path: path.name)  # names begin with the time
    if not files:
        return
    writer = EventFileWriter(str(folder))
    for path in files:
        for event in LegacyEventFileLoader(str(path)).Load():
            for number in reversed(range(len(event.summary.value))):
                if event.summary.value[number].metadata.plugin_data.plugin_name == PLUGIN_NAME:
                    del event.summary.value[number]
            if not event.HasField("file_version"):  # the writer begins with one of its own
                writer.add_event(event)
    writer.close()


def _layout(sweep: SweepResult) -> dict[str, dict[str, list]]:
    """Category -> chart -> ["Multiline", tags]: first the losses, of all tokens and group by group, then the rest."""
    tags = {tag for run in sweep.runs for stage in run.stages for tag in stage.scalars}
    layout: dict[str, list[str]] = {sweep.title: [tag for tag in CURVES if tag in tags]}
    for family, _, tag in sorted((match[1], int(match[2]), tag) for tag in tags if (match := GROUPS.match(tag))):
        category = sweep.title if family.removeprefix("groups/") in ("val_loss", "val_flow") else family
        layout.setdefault(category, []).append(tag)
    return {
        category: {tag: ["Multiline", [f"^{tag}$"]] for tag in charts} for category, charts in layout.items() if charts
    }
