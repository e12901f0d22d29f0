"""The results of a sweep, read from its folder: cells of a grid, each with a run per seed, each run with its stages."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from dar_lightning.errors import UserError, require
from dar_lightning.files import read_json
from dar_lightning.records.protocol import Protocol
from dar_lightning.sweeps.curves import Curve, read_scalars

SWEEP, RUN, METRICS, SAMPLES = "sweep.json", "cell.json", "metrics.json", "samples.png"
STATUSES = ("done", "failed", "pending")


@dataclass(frozen=True)
class StageResult:
    """One command of a run: a training, an extraction, a measurement."""

    name: str
    folder: Path  # runs that share the work have the same
    status: str  # done, failed or pending
    code: dict[str, Any] | None = None  # that made it (`records.provenance.read_code`); None where it was not noted

    @cached_property
    def scalars(self) -> dict[str, Curve]:
        """Its curves by tag; none where nothing was logged."""
        return read_scalars(self.folder)


@dataclass(frozen=True)
class RunResult:
    """A cell with one seed."""

    cell: str
    seed: int
    folder: Path  # its own; `samples.png` is there
    status: str  # done, failed or pending
    stages: tuple[StageResult, ...] = ()  # in the order in which they run
    metrics: dict[str, float] = field(default_factory=dict)  # empty unless it is done
    works: dict[str, Path] = field(default_factory=dict)  # metric -> folder of its stage, which runs may share
    protocols: dict[str, Protocol] = field(default_factory=dict)  # by stage; of trainings by "STAGE, METRIC"


@dataclass(frozen=True)
class CellResult:
    """A place in the grid."""

    name: str
    values: dict[str, Any]  # axis -> value
    paper: dict[str, float]  # what the paper reports for it, by metric
    runs: tuple[RunResult, ...]  # one per seed

    def having(self, status: str) -> list[RunResult]:
        """The runs of that status."""
        return [run for run in self.runs if run.status == status]

    def stages(self, name: str) -> list[StageResult]:
        """The finished stages of that name, one per folder: seeds that share the work count once."""
        found = {stage.folder: stage for run in self.runs for stage in run.stages if stage.name == name}
        return [stage for stage in found.values() if stage.status == "done"]


@dataclass(frozen=True)
class SweepResult:
    """A grid of cells."""

    folder: Path
    title: str
    axes: dict[str, list[Any]]  # axis -> its values in order
    x_axis: str  # the axis that plots run over
    metrics: tuple[str, ...]  # those that the study is about
    budget: str  # what each run was given, in words
    cells: tuple[CellResult, ...]

    @property
    def runs(self) -> list[RunResult]:
        """Those of all cells."""
        return [run for cell in self.cells for run in cell.runs]

    @cached_property
    def varied_stages(self) -> list[str]:
        """Names of the stages that are not one and the same work in all cells."""
        names = dict.fromkeys(stage.name for run in self.runs for stage in run.stages)
        folders = {name: [{stage.folder for stage in cell.stages(name)} for cell in self.cells] for name in names}
        apart = {name: any(a and b and not a & b for a, b in combinations(folders[name], 2)) for name in names}
        return [name for name in names if apart[name] or len(self.cells) == 1]


def run_folder(root: Path, cell: str, seed: int) -> Path:
    """Where a sweep keeps the results of a cell with a seed."""
    return root / "cells" / cell / f"seed{seed}"


def read_sweep(folder: str | Path) -> SweepResult:
    """Read the folder of a sweep, finished or not.

    Raises:
        UserError: it is no sweep's folder, a file of it is damaged, or runs were measured by different protocols.
    """
    folder = Path(folder)
    require((folder / SWEEP).is_file(), f"{folder} has no {SWEEP}: give a folder that dar sweep wrote")
    told = read_json(folder / SWEEP)
    try:
        cells = []
        for cell in told["cells"]:
            runs = tuple(_run(folder, cell["name"], seed) for seed in cell["seeds"])
            cells.append(CellResult(cell["name"], cell["values"], cell["paper"], runs))
        fields = {name: told[name] for name in ("title", "axes", "x_axis", "budget")}
        sweep = SweepResult(folder, **fields, metrics=tuple(told["figures"]), cells=tuple(cells))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is not what dar sweep writes: {error!r}") from error
    _check_protocols([run for run in sweep.runs if run.status == "done"])
    return sweep


def _run(root: Path, cell: str, seed: int) -> RunResult:
    folder = run_folder(root, cell, seed)
    told = read_json(folder / RUN) if (folder / RUN).is_file() else {"status": "pending", "stages": []}
    stages = tuple(
        StageResult(stage["name"], root / stage["folder"], stage["status"], stage.get("code"))
        for stage in told["stages"]
    )
    status = told["status"]
    if status == "done" and not (folder / METRICS).is_file():
        status = "pending"  # killed in between: the sweep, started again, writes them
    if status != "done":
        return RunResult(cell, seed, folder, status, stages)
    measured = read_json(folder / METRICS)
    metrics = {name: value for name, value in measured["figures"].items() if value is not None}  # None: infinite PSNR
    folders = {stage.name: stage.folder for stage in stages}
    works = {metric: folders[stage] for metric, stage in measured["stages"].items()}
    protocols = {stage: Protocol.from_json(protocol) for stage, protocol in measured["protocol"].items()}
    return RunResult(cell, seed, folder, "done", stages, metrics, works, protocols)


def _check_protocols(runs: list[RunResult]) -> None:
    """What cells compare is how samples were made; all else that metrics depend on must be equal."""
    nothing = Protocol.from_json({})
    for run in runs[1:]:
        first = runs[0]
        for stage in first.protocols.keys() | run.protocols.keys():
            one, other = (each.protocols.get(stage, nothing) for each in (first, run))
            for name, values in one.differences(other).items():
                place = f"{stage}'s protocols differ in {name}: {values}"
                raise UserError(f"{first.folder} and {run.folder} cannot be compared, {place}")
