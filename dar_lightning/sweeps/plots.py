"""Plots of a sweep and of a table: metrics over the axis of the study, curves, loss by group of tokens, samples."""

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dar_lightning.files import atomic_path
from dar_lightning.sweeps.results import SAMPLES, CellResult, StageResult, SweepResult
from dar_lightning.sweeps.tables import CURVES, GROUPS, Row, remarks, shown_metrics, value_text

PANEL = (3.6, 3.0)  # inches
CORNER, COLUMNS = (660, 920), 5  # pixels of a cell's samples that are shown; cells in a row


def cell_colors(sweep: SweepResult) -> dict[str, Any]:
    """A colour per cell: from a scale where the axis of the study counts, else apart from each other."""
    count = len(sweep.cells)
    if _counts(sweep.axes[sweep.x_axis]):
        return {cell.name: colormaps["viridis"](0.9 * i / max(1, count - 1)) for i, cell in enumerate(sweep.cells)}
    return {cell.name: f"C{i % 10}" for i, cell in enumerate(sweep.cells)}


def plot_metrics(sweep: SweepResult, rows: list[Row]) -> Figure | None:
    """A panel per measured metric, every run a dot beside its cell's mean ± std; below, the paper's numbers."""
    found = {(row.cell.name, row.source, row.metric): row for row in rows}
    measured = [name for name in shown_metrics(sweep, rows) if any(key[1:] == ("measured", name) for key in found)]
    if not measured:
        return None
    papers = dict.fromkeys(row.metric for row in rows if row.source == "paper")
    panels = [("measured", name) for name in measured] + [("paper", name) for name in papers]
    titles = [name if source == "measured" else f"paper: {name}" for source, name in panels]
    figure, grid = _panels(sweep, titles, sweep.x_axis)
    known = {value_text(row.cell.values[sweep.x_axis]) for row in rows if sweep.x_axis in row.cell.values}
    shown = [text for value in sweep.axes[sweep.x_axis] if (text := value_text(value)) in known]  # pending cells wait
    places = {text: place for place, text in enumerate(shown)}
    line = "o-" if _counts(sweep.axes[sweep.x_axis]) else "o"
    for axes, (source, name) in zip(grid, panels, strict=True):
        for number, (label, cells) in enumerate(_series(sweep).items()):
            drawn = {
                places[value_text(cell.values[sweep.x_axis])]: row
                for cell in cells
                if (row := found.get((cell.name, source, name)))
            }
            for place, row in drawn.items():
                if len(row.values) > 1:
                    dots = [place + 0.12] * len(row.values)
                    axes.plot(dots, row.values, ".", color=f"C{number}", markersize=4, alpha=0.5)
            if drawn:
                means, spread = zip(*((row.mean, row.std or 0.0) for row in drawn.values()), strict=True)
                style = dict(fmt=line, capsize=4, linewidth=1, color=f"C{number}", label=label)
                axes.errorbar(list(drawn), means, spread, **style)
        turned = dict(rotation=20, ha="right") if max(map(len, places)) > 12 else {}
        turned = dict(rotation=90) if sum(map(len, places)) > 60 else turned  # labels of a panel's width
        axes.set_xticks(range(len(places)), places, fontsize=8, **turned)
        axes.set_xlim(-0.5, len(places) - 0.5)
        if source == "paper":
            axes.set_facecolor("#f4f4f4")
    if len(_series(sweep)) > 1:
        grid[0].legend(fontsize=8)
    return figure


def plot_curves(sweep: SweepResult) -> Figure | None:
    """Validation losses over steps: a thin line per training, a thick one where their mean is."""
    panels = [
        (name, tag)
        for name in sweep.varied_stages
        for tag in CURVES
        if any(tag in stage.scalars for stage in _stages(sweep, name))
    ]
    if not panels:
        return None
    figure, grid = _panels(sweep, [f"{name}: {tag}" for name, tag in panels], "step", width=1.5)
    colors = cell_colors(sweep)
    for axes, (name, tag) in zip(grid, panels, strict=True):
        for cell in sweep.cells:
            color = colors[cell.name]
            curves = [stage.scalars[tag] for stage in cell.stages(name) if tag in stage.scalars]
            for curve in curves:
                axes.plot(curve.steps, curve.values, color=color, linewidth=0.7, alpha=0.6)
            if curves:
                steps, mean = _mean(curves)
                label = f"{_label(cell)} (n = {len(curves)})"
                axes.plot(steps, mean, "o-", markersize=4, color=color, linewidth=2, label=label)
        axes.legend(fontsize=8)
    return figure


def plot_groups(sweep: SweepResult) -> Figure | None:
    """What validation last said of each group of tokens: mean ± std per cell."""
    tags = {(name, tag) for name in sweep.varied_stages for stage in _stages(sweep, name) for tag in stage.scalars}
    panels = sorted({(name, match[1]) for name, tag in tags if (match := GROUPS.match(tag))})
    if not panels:
        return None
    figure, grid = _panels(sweep, [f"{name}: {family}" for name, family in panels], "group of tokens", width=1.3)
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
    shown = [(cell, run) for cell in sweep.cells for run in cell.having("done")[:1] if (run.folder / SAMPLES).is_file()]
    if not shown:
        return None
    columns = min(COLUMNS, len(shown))
    corners = []
    for _, run in shown:
        with Image.open(run.folder / SAMPLES) as image:
            corners.append(np.asarray(image.convert("RGB"))[: CORNER[1], : CORNER[0]])
    width, height = (max(corner.shape[axis] for corner in corners) / 200 for axis in (1, 0))  # half size at 100 dpi
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(columns * (width + 0.1), lines * (height + 0.3)), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (cell, run), corner in zip(grid, shown, corners, strict=False):
        axes.imshow(corner)
        axes.set_title(f"{_label(cell)}, seed {run.seed}", fontsize=9, loc="left")
    return figure


def plot_table(
    title: str, caveat: str, frechet: str, results: list[dict[str, Any]], labels: list[str], axis: str
) -> Figure:
    """A table's Frechet distance of each row, and the paper's FID, in two panels with the same rows."""
    ours, places = [row["metrics"][frechet] for row in results], range(len(results))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    spread = [one["std"] or 0.0 for one in ours]
    left.errorbar(places, [one["mean"] for one in ours], spread, fmt="o", capsize=4, color="C0")
    left.set_title(f"here: {frechet}", fontsize=10)
    right.plot(places, [row["paper"].get("FID", float("nan")) for row in results], "s", color="C1")
    right.set_title("paper: FID", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(places, labels, fontsize=8)
        axes.set_xlabel(axis, fontsize=8)
        axes.set_xlim(-0.5, len(results) - 0.5)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(textwrap.fill(caveat, 150), fontsize=7)
    return figure


def save_plot(figure: Figure, path: Path) -> None:
    """Write a PNG, or a JPEG by the name's ending, atomically."""
    with atomic_path(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix("."), dpi=100)


def _counts(values: Iterable) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _panels(sweep: SweepResult, titles: list[str], x_label: str, width: float = 1.0) -> tuple[Figure, list[Axes]]:
    count = len(titles)
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    lines = math.ceil(count / columns)
    size = (max(5.0, PANEL[0] * width * columns), PANEL[1] * lines + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label, fontsize=9)
        axes.grid(alpha=0.3)
    figure.suptitle(sweep.title, fontsize=11)
    letters = int(20 * size[0])  # of a line
    figure.supxlabel("\n".join(textwrap.fill(remark, letters) for remark in remarks(sweep)), fontsize=6)
    return figure, grid[:count]


def _series(sweep: SweepResult) -> dict[str, list[CellResult]]:
    """Cells that differ in the axis of the study alone, named for the others."""
    series: dict[str, list[CellResult]] = {}
    for cell in sweep.cells:
        if sweep.x_axis in cell.values:
            others = [f"{axis} {value_text(value)}" for axis, value in cell.values.items() if axis != sweep.x_axis]
            series.setdefault(", ".join(others), []).append(cell)
    return series


def _label(cell: CellResult) -> str:
    return ", ".join(f"{axis} {value_text(value)}" for axis, value in cell.values.items()) or cell.name


def _stages(sweep: SweepResult, name: str) -> list[StageResult]:
    return [stage for cell in sweep.cells for stage in cell.stages(name)]


def _mean(curves: list) -> tuple[np.ndarray, np.ndarray]:
    """Over the steps that all curves have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    return steps, np.mean([curve.values[np.isin(curve.steps, steps)] for curve in curves], axis=0)
