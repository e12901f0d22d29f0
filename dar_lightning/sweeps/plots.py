"""A sweep's plots: figures over the axis of the study, curves, loss by group of tokens, and samples side by side."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from dar_lightning.files import atomic_path
from dar_lightning.sweeps.results import SAMPLES, Cell, Results, Stage
from dar_lightning.sweeps.tables import CURVES, GROUPS, Row, remarks, shown_figures, value_text

PANEL = (3.6, 3.0)  # inches
CORNER, COLUMNS = (660, 920), 5  # pixels of a cell's samples that are shown, at half size; cells in a row


def cell_colors(sweep: Results) -> dict[str, Any]:
    """A colour per cell: from a scale where the axis of the study counts, else apart from each other."""
    count = len(sweep.cells)
    if _counts(sweep.axes[sweep.x_axis]):
        return {cell.name: colormaps["viridis"](0.9 * i / max(1, count - 1)) for i, cell in enumerate(sweep.cells)}
    return {cell.name: f"C{i % 10}" for i, cell in enumerate(sweep.cells)}


def plot_figures(sweep: Results, rows: list[Row]) -> Figure | None:
    """A panel per measured figure, every run a dot beside its cell's mean ± std; below, the paper's numbers."""
    found = {(row.cell.name, row.source, row.figure): row for row in rows}
    measured = [name for name in shown_figures(sweep, rows) if any(key[1:] == ("measured", name) for key in found)]
    papers = list(dict.fromkeys(row.figure for row in rows if row.source == "paper"))
    if not measured:
        return None
    panels = [("measured", name) for name in measured] + [("paper", name) for name in papers]
    figure, grid = _panels(len(panels))
    places = {value_text(value): place for place, value in enumerate(sweep.axes[sweep.x_axis])}
    for axes, (source, name) in zip(grid, panels, strict=True):
        for number, (label, cells) in enumerate(_series(sweep).items()):
            present = [(cell, row) for cell in cells if (row := found.get((cell.name, source, name)))]
            drawn = [(places[value_text(cell.values[sweep.x_axis])], row) for cell, row in present]
            _errorbars(axes, drawn, f"C{number}", label, connect=_counts(sweep.axes[sweep.x_axis]))
        axes.set_title(name if source == "measured" else f"paper: {name}", fontsize=10)
        slanted = dict(rotation=20, ha="right") if max(map(len, places)) > 12 else {}
        axes.set_xticks(range(len(places)), places, fontsize=8, **slanted)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel(sweep.x_axis, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        if source == "paper":
            axes.set_facecolor("#f4f4f4")
    if len(_series(sweep)) > 1:
        grid[0].legend(fontsize=8)
    return _titled(figure, sweep)


def plot_curves(sweep: Results) -> Figure | None:
    """Validation losses over steps: a thin line per training, a thick one where their mean is."""
    panels = [(stage, tag) for stage in sweep.varied_stages for tag in CURVES if _logged(sweep, stage, tag)]
    if not panels:
        return None
    figure, grid = _panels(len(panels), width=1.5)
    for axes, (name, tag) in zip(grid, panels, strict=True):
        for cell in sweep.cells:
            color = cell_colors(sweep)[cell.name]
            curves = [stage.scalars[tag] for stage in cell.stages(name) if tag in stage.scalars]
            for curve in curves:
                axes.plot(curve.steps, curve.values, color=color, linewidth=0.7, alpha=0.6)
            if curves:
                steps, mean = _mean(curves)
                label = f"{_label(sweep, cell)} (n = {len(curves)})"
                axes.plot(steps, mean, "o-", markersize=4, color=color, linewidth=2, label=label)
        axes.set_title(f"{name}: {tag}", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _titled(figure, sweep)


def plot_groups(sweep: Results) -> Figure | None:
    """What validation last said of each group of tokens: mean ± std per cell."""
    tags = {(name, tag) for name in sweep.varied_stages for stage in _stages(sweep, name) for tag in stage.scalars}
    panels = sorted({(name, match[1]) for name, tag in tags if (match := GROUPS.match(tag))})
    if not panels:
        return None
    figure, grid = _panels(len(panels), width=1.3)
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
                means = [np.mean(values[k]) for k in groups]
                style = dict(color=cell_colors(sweep)[cell.name], label=_label(sweep, cell))
                axes.errorbar(groups, means, spread, marker="o", markersize=3, capsize=3, linewidth=1, **style)
        axes.set_title(f"{name}: {family}", fontsize=10)
        counted = "group of tokens" if family.startswith("groups/") else "part of the sequence as written"
        axes.set_xlabel(counted, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0].legend(fontsize=8)
    return _titled(figure, sweep)


def samples_side_by_side(sweep: Results) -> Image.Image | None:
    """The first samples of each cell's first finished run under its name, cells beside each other.

    A corner of each grid is shown, since a whole one of some hundred images would be a carpet.
    """
    shown = [(cell, run) for cell in sweep.cells for run in cell.having("done")[:1] if (run.folder / SAMPLES).is_file()]
    if not shown:
        return None
    columns, line, pad = min(COLUMNS, len(shown)), 20, 6
    tiles = []
    for _, run in shown:
        with Image.open(run.folder / SAMPLES) as image:
            corner = tuple(map(min, image.size, CORNER))
            tiles.append(image.convert("RGB").crop((0, 0, *corner)).reduce(2))
    width, height = max(tile.width for tile in tiles) + pad, max(tile.height for tile in tiles) + line + pad
    sheet = Image.new("RGB", (pad + columns * width, pad + -(-len(shown) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, ((cell, run), tile) in enumerate(zip(shown, tiles, strict=True)):
        left, top = pad + number % columns * width, pad + number // columns * height
        draw.text((left, top), f"{_label(sweep, cell)}, seed {run.seed}", fill="black", font=font)
        sheet.paste(tile, (left, top + line))
    return sheet


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=100)


# ---- pieces


def _counts(values: Iterable) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _panels(count: int, width: float = 1.0) -> tuple[Figure, list[Axes]]:
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    lines = math.ceil(count / columns)
    size = (max(5.0, PANEL[0] * width * columns), PANEL[1] * lines + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _titled(figure: Figure, sweep: Results) -> Figure:
    figure.suptitle(sweep.title, fontsize=11)
    figure.supxlabel("\n".join(remarks(sweep)), fontsize=6)
    return figure


def _series(sweep: Results) -> dict[str, list[Cell]]:
    """Cells that differ in the axis of the study alone, named for the others."""
    series: dict[str, list[Cell]] = {}
    for cell in sweep.cells:
        if sweep.x_axis in cell.values:
            others = [f"{axis} {value_text(value)}" for axis, value in cell.values.items() if axis != sweep.x_axis]
            series.setdefault(", ".join(others), []).append(cell)
    return series


def _label(sweep: Results, cell: Cell) -> str:
    return ", ".join(f"{axis} {value_text(value)}" for axis, value in cell.values.items()) or cell.name


def _errorbars(axes: Axes, drawn: list[tuple[int, Row]], color: str, label: str, connect: bool) -> None:
    if not drawn:
        return
    places, rows = zip(*drawn, strict=True)
    for place, row in drawn:
        if len(row.values) > 1:
            axes.plot([place + 0.12] * len(row.values), row.values, ".", color=color, markersize=4, alpha=0.5)
    means, spread = [row.mean for row in rows], [row.std or 0.0 for row in rows]
    style = dict(fmt="o-" if connect else "o", capsize=4, linewidth=1, color=color, label=label)
    axes.errorbar(places, means, spread, **style)


def _stages(sweep: Results, name: str) -> list[Stage]:
    return [stage for cell in sweep.cells for stage in cell.stages(name)]


def _logged(sweep: Results, name: str, tag: str) -> bool:
    return any(tag in stage.scalars for stage in _stages(sweep, name))


def _mean(curves: list) -> tuple[np.ndarray, np.ndarray]:
    """Over the steps that all curves have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    return steps, np.mean([curve.values[np.isin(curve.steps, steps)] for curve in curves], axis=0)
