"""Plots of a sweep and of a table: metrics over the axis of the study, curves, loss by group of tokens, samples."""

import math
import textwrap
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dar_lightning.files import atomic_path
from dar_lightning.sweeps.results import SAMPLES, CellResult, SweepResult
from dar_lightning.sweeps.tables import CURVES, GROUPS, Row, is_number, remarks, shown_metrics, value_text

PANEL = (3.6, 3.0)  # inches
CORNER, COLUMNS = (660, 920), 5  # pixels of a cell's samples that are shown; cells in a row


def cell_colors(sweep: SweepResult) -> dict[str, Any]:
    """A colour per cell: from a scale where the axis of the study counts, else apart from each other."""
    scale, last = colormaps["viridis"], max(1, len(sweep.cells) - 1)
    counts = all(map(is_number, sweep.axes[sweep.x_axis]))
    return {cell.name: scale(0.9 * i / last) if counts else f"C{i % 10}" for i, cell in enumerate(sweep.cells)}


def plot_metrics(sweep: SweepResult, rows: list[Row]) -> Figure | None:
    """A panel per measured metric, every run a dot beside its cell's mean ± std; below, the paper's numbers."""
    found = {(row.cell.name, row.source, row.metric): row for row in rows}
    measured = {row.metric for row in rows if row.source == "measured"}
    panels = [("measured", name) for name in shown_metrics(sweep, rows) if name in measured]
    if not panels:
        return None
    panels += dict.fromkeys(("paper", row.metric) for row in rows if row.source == "paper")
    titles = [name if source == "measured" else f"paper: {name}" for source, name in panels]
    figure, grid = _panels(sweep.title, remarks(sweep), titles, sweep.x_axis)
    known = {value_text(row.cell.values[sweep.x_axis]) for row in rows}  # pending cells wait for their places
    shown = [text for text in map(value_text, sweep.axes[sweep.x_axis]) if text in known]
    series: dict[str, list[CellResult]] = {}  # of cells that differ in this axis alone, named for the others
    for cell in sweep.cells:
        others = [f"{axis} {value_text(value)}" for axis, value in cell.values.items() if axis != sweep.x_axis]
        series.setdefault(", ".join(others), []).append(cell)
    line = "o-" if all(map(is_number, sweep.axes[sweep.x_axis])) else "o"
    turned = dict(rotation=20, ha="right") if max(map(len, shown)) > 12 else {}
    turned = dict(rotation=90) if sum(map(len, shown)) > 60 else turned  # labels of a panel's width
    for axes, panel in zip(grid, panels, strict=True):
        for number, (label, cells) in enumerate(series.items()):
            drawn = [found[cell.name, *panel] for cell in cells if (cell.name, *panel) in found]
            places = [shown.index(value_text(row.cell.values[sweep.x_axis])) for row in drawn]
            for place, row in zip(places, drawn, strict=True):
                if len(row.values) > 1:
                    dots = [place + 0.12] * len(row.values)
                    axes.plot(dots, row.values, ".", color=f"C{number}", markersize=4, alpha=0.5)
            if drawn:
                style = dict(fmt=line, capsize=4, linewidth=1, color=f"C{number}", label=label)
                axes.errorbar(places, [row.mean for row in drawn], [row.std or 0.0 for row in drawn], **style)
        axes.set_xticks(range(len(shown)), shown, fontsize=8, **turned)
        axes.set_xlim(-0.5, len(shown) - 0.5)
        if panel[0] == "paper":
            axes.set_facecolor("#f4f4f4")
    if len(series) > 1:
        grid[0].legend(fontsize=8)
    return figure


def plot_curves(sweep: SweepResult) -> Figure | None:
    """Validation losses over steps: a thin line per training, a thick one where their mean is."""
    logged = _logged(sweep)
    panels = [(name, tag) for name in sweep.varied_stages for tag in CURVES if (name, tag) in logged]
    if not panels:
        return None
    titles = [f"{name}: {tag}" for name, tag in panels]
    figure, grid = _panels(sweep.title, remarks(sweep), titles, "step", width=1.5)
    colors = cell_colors(sweep)
    for axes, (name, tag) in zip(grid, panels, strict=True):
        for cell in sweep.cells:
            color = colors[cell.name]
            curves = [stage.scalars[tag] for stage in cell.stages(name) if tag in stage.scalars]
            for curve in curves:
                axes.plot(curve.steps, curve.values, color=color, linewidth=0.7, alpha=0.6)
            if curves:
                steps = reduce(np.intersect1d, (curve.steps for curve in curves))
                mean = np.mean([curve.values[np.isin(curve.steps, steps)] for curve in curves], axis=0)
                label = f"{_label(cell)} (n = {len(curves)})"
                axes.plot(steps, mean, "o-", markersize=4, color=color, linewidth=2, label=label)
        axes.legend(fontsize=8)
    return figure


def plot_groups(sweep: SweepResult) -> Figure | None:
    """What validation last said of each group of tokens: mean ± std per cell."""
    panels = sorted({(name, match[1]) for name, tag in _logged(sweep) if (match := GROUPS.match(tag))})
    if not panels:
        return None
    titles = [f"{name}: {family}" for name, family in panels]
    figure, grid = _panels(sweep.title, remarks(sweep), titles, "group of tokens", width=1.3)
    colors = cell_colors(sweep)
    for axes, (name, family) in zip(grid, panels, strict=True):
        for cell in sweep.cells:
            values: dict[int, list[float]] = {}
            for stage in cell.stages(name):
                for tag, curve in stage.scalars.items():
                    if (match := GROUPS.match(tag)) and match[1] == family:
                        values.setdefault(int(match[2]), []).append(float(curve.values[-1]))
            if values:
                groups = sorted(values)
                spread = [np.std(values[k], ddof=1) if len(values[k]) > 1 else 0.0 for k in groups]
                style = dict(color=colors[cell.name], label=_label(cell), marker="o", markersize=3, capsize=3)
                axes.errorbar(groups, [np.mean(values[k]) for k in groups], spread, linewidth=1, **style)
        if not family.startswith("groups/"):
            axes.set_xlabel("part of the sequence as written", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].legend(fontsize=8)
    return figure


def plot_samples(sweep: SweepResult) -> Figure | None:
    """The first samples of each cell's first finished run under its name, cells beside each other.

    A corner of each grid is shown, since a whole one of some hundred images would be a carpet.
    """
    corners = {}
    for cell in sweep.cells:
        for run in cell.having("done")[:1]:
            if (run.folder / SAMPLES).is_file():
                with Image.open(run.folder / SAMPLES) as image:
                    corner = np.asarray(image.convert("RGB"))[: CORNER[1], : CORNER[0]]
                corners[f"{_label(cell)}, seed {run.seed}"] = corner
    if not corners:
        return None
    columns = min(COLUMNS, len(corners))
    lines = math.ceil(len(corners) / columns)
    height, width = (max(corner.shape[axis] for corner in corners.values()) / 200 for axis in (0, 1))  # half size
    figure = Figure(figsize=(columns * (width + 0.1), lines * (height + 0.3)), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, corner) in zip(grid, corners.items(), strict=False):
        axes.imshow(corner)
        axes.set_title(title, fontsize=9, loc="left")
    return figure


def plot_table(
    title: str, caveat: str, frechet: str, results: list[dict[str, Any]], labels: list[str], axis: str
) -> Figure:
    """A table's Frechet distance of each row, and the paper's FID, in two panels with the same rows."""
    ours, places = [row["metrics"][frechet] for row in results], range(len(results))
    figure, (left, right) = _panels(title, [caveat], [f"here: {frechet}", "paper: FID"], axis, width=1.25)
    left.errorbar(places, [one["mean"] for one in ours], [one["std"] or 0.0 for one in ours], fmt="o", capsize=4)
    right.plot(places, [row["paper"].get("FID", float("nan")) for row in results], "s", color="C1")
    for axes in (left, right):
        axes.set_xticks(places, labels, fontsize=8)
        axes.set_xlim(-0.5, len(results) - 0.5)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    return figure


def save_plot(figure: Figure, path: Path) -> None:
    """Write a PNG, or a JPEG by the name's ending, atomically."""
    with atomic_path(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix("."), dpi=100)


def _panels(
    title: str, notes: list[str], titles: list[str], x_label: str, width: float = 1.0
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes, one for each title, and notes below."""
    count = len(titles)
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    lines = math.ceil(count / columns)
    size = (max(5.0, PANEL[0] * width * columns), PANEL[1] * lines + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes, name in zip(grid, titles, strict=False):
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(x_label, fontsize=9)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    letters = int(20 * size[0])  # of a line
    figure.supxlabel("\n".join(textwrap.fill(note, letters) for note in notes), fontsize=6)
    return figure, grid[:count]


def _label(cell: CellResult) -> str:
    return ", ".join(f"{axis} {value_text(value)}" for axis, value in cell.values.items())


def _logged(sweep: SweepResult) -> set[tuple[str, str]]:
    """(stage, tag) of every curve of the stages that vary."""
    stages = [stage for name in sweep.varied_stages for cell in sweep.cells for stage in cell.stages(name)]
    return {(stage.name, tag) for stage in stages for tag in stage.scalars}
