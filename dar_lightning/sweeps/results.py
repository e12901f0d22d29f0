"""What `dar sweep` leaves behind: cells of a grid, each with a run per seed, each run with its stages."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from dar_lightning.errors import UserError
from dar_lightning.files import read_json
from dar_lightning.records.protocol import EXPLAINS
from dar_lightning.sweeps.curves import Curve, read_scalars

SWEEP, RUN, METRICS, SAMPLES = "sweep.json", "cell.json", "metrics.json", "samples.png"
STATUSES = ("done", "failed", "pending")
# Of protocols, what need not be equal: how images were made (dar reconstruct notes it apart), and what explains.
MADE = ("samples", "tokenizer", "solver", "num_steps", "seed", "ema", *EXPLAINS)
PLACES = ("npz", "folder", "shards", "statistics_of")  # of a set that a hash identifies


@dataclass(frozen=True)
class Stage:
    """One command of a run: a training, an extraction, a measurement.

    Attributes:
        name: what it does, such as "ar".
        folder: where it worked; runs that share the work have the same.
        status: done, failed or pending.
        seconds: how long it took.
        code: that made it, see `dar_lightning.records.provenance.read_code`; None where it was not noted.
    """

    name: str
    folder: Path
    status: str
    seconds: float | None
    code: dict[str, Any] | None = None

    @cached_property
    def scalars(self) -> dict[str, Curve]:
        """Its curves by tag; none where nothing was logged."""
        return read_scalars(self.folder)


@dataclass(frozen=True)
class Run:
    """A cell with one seed.

    Attributes:
        cell: the cell's name.
        seed: of everything that the run draws.
        folder: its own; `samples.png` is there.
        status: done, failed or pending.
        stages: in the order in which they run.
        figures: what was measured at its end; empty unless it is done.
        works: where each was measured: the folder of its stage, which runs may share.
        protocols: how they were, by the stage that did it, and for what trainings measured by "STAGE, FIGURE".
    """

    cell: str
    seed: int
    folder: Path
    status: str
    stages: tuple[Stage, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    works: dict[str, Path] = field(default_factory=dict)
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A place in the grid.

    Attributes:
        name: unique in the sweep.
        values: axis -> value.
        paper: what the paper reports for it, by figure.
        runs: one per seed.
    """

    name: str
    values: dict[str, Any]
    paper: dict[str, float]
    runs: tuple[Run, ...]

    def having(self, status: str) -> list[Run]:
        return [run for run in self.runs if run.status == status]

    def stages(self, name: str) -> list[Stage]:
        """The finished stages of that name, one per folder: seeds that share the work count once."""
        found = {stage.folder: stage for run in self.runs for stage in run.stages if stage.name == name}
        return [stage for stage in found.values() if stage.status == "done"]


@dataclass(frozen=True)
class Results:
    """A grid of cells.

    Attributes:
        folder: where it is.
        name: of the sweep.
        title: the same in words.
        axes: axis -> its values in order.
        x_axis: the axis that plots run over.
        figures: the measured figures that the study is about.
        budget: what each run was given, in words.
        cells: in the order of the sweep.
    """

    folder: Path
    name: str
    title: str
    axes: dict[str, list[Any]]
    x_axis: str
    figures: tuple[str, ...]
    budget: str
    cells: tuple[Cell, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    @cached_property
    def varied_stages(self) -> list[str]:
        """Names of the stages that are not one and the same work in all cells."""
        names = dict.fromkeys(stage.name for run in self.runs for stage in run.stages)
        folders = {name: [{stage.folder for stage in cell.stages(name)} for cell in self.cells] for name in names}
        apart = {name: any(a and b and not a & b for a, b in combinations(folders[name], 2)) for name in names}
        return [name for name in names if apart[name] or len(self.cells) == 1]


def read_sweep(folder: str | Path) -> Results:
    """Read the folder of a sweep, finished or not.

    Raises:
        UserError: it is no sweep's folder, a file of it is damaged, or runs were measured by different protocols.
    """
    folder = Path(folder)
    if not (folder / SWEEP).is_file():
        raise UserError(f"{folder} has no {SWEEP}: give a folder that dar sweep wrote")
    told = read_json(folder / SWEEP)
    try:
        cells = tuple(_cell(folder, cell) for cell in told["cells"])
        sweep = Results(
            folder=folder,
            name=told["name"],
            title=told.get("title") or told["name"],
            axes=told["axes"],
            x_axis=told["x_axis"],
            figures=tuple(told["figures"]),
            budget=told.get("budget") or "",
            cells=cells,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is not what dar sweep writes: {error!r}") from error
    _check_protocols(sweep)
    return sweep


def _cell(folder: Path, told: dict[str, Any]) -> Cell:
    runs = tuple(_run(folder, told["name"], seed) for seed in told["seeds"])
    return Cell(told["name"], told["values"], told.get("paper") or {}, runs)


def _run(root: Path, cell: str, seed: int) -> Run:
    folder = root / "cells" / cell / f"seed{seed}"
    if not (folder / RUN).is_file():
        return Run(cell, seed, folder, "pending")
    told = read_json(folder / RUN)
    if told["status"] not in STATUSES:
        raise UserError(f"{folder / RUN}: status is {told['status']!r}: it must be {', '.join(STATUSES)}")
    stages = tuple(
        Stage(stage["name"], root / stage["folder"], stage["status"], stage.get("seconds"), stage.get("code"))
        for stage in told["stages"]
    )
    if told["status"] != "done":
        return Run(cell, seed, folder, told["status"], stages)
    if not (folder / METRICS).is_file():
        raise UserError(f"{folder / METRICS} is missing, but the run is done: start dar sweep again")
    measured = read_json(folder / METRICS)
    figures = {name: value for name, value in measured["figures"].items() if value is not None}  # None: infinite PSNR
    folders = {stage.name: stage.folder for stage in stages}
    works = {figure: folders[stage] for figure, stage in measured.get("stages", {}).items()}
    return Run(cell, seed, folder, "done", stages, figures, works, measured["protocol"])


def _check_protocols(sweep: Results) -> None:
    done = [run for run in sweep.runs if run.status == "done"]
    for run in done[1:]:
        for stage in done[0].protocols.keys() | run.protocols.keys():
            difference = _difference(done[0].protocols.get(stage, {}), run.protocols.get(stage, {}))
            if difference is not None:
                raise UserError(
                    f"{done[0].folder} and {run.folder} cannot be compared, {stage}'s protocols differ in {difference}"
                )


def _difference(protocol: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What makes a stage's figures of two cells incomparable: "field: value, other value", or None if nothing does.

    How images were made is what cells compare: of that, only their number must be equal. Sets with hashes may lie
    anywhere. Versions may differ; they are kept to explain what nothing else does.
    """
    mine, theirs = _facts(protocol), _facts(other)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"{name}: {mine.get(name)}, {theirs.get(name)}"
    return None


def _facts(protocol: dict[str, Any]) -> dict[str, Any]:
    samples = {"n": protocol.get("samples", {}).get("n")}
    rest = {name: value for name, value in protocol.items() if name not in MADE}
    return dict(_flat({"samples": samples} | rest, ""))


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    identified = "sha256" in values or "statistics_sha256" in values
    for name, value in values.items():
        if identified and name in PLACES:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
