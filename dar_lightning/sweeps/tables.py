"""One tidy table of a sweep: what was measured, its mean and spread over seeds, and the paper's numbers."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dar_lightning.files import write_text
from dar_lightning.records.protocol import PAPER_COUNT
from dar_lightning.records.provenance import code_name
from dar_lightning.sweeps.results import STATUSES, Cell, Results, Run

CURVES = ("val/loss", "val/flow")  # what the two kinds of training are judged by
GROUPS = re.compile(r"(groups/val_\w+?|written/val_\w+?)_(\d+)$")  # a scalar per group of tokens, or per part written


@dataclass(frozen=True)
class Row:
    """One figure of one cell.

    Attributes:
        cell: which.
        source: "measured" (by commands, or in a training's last validation) or "paper".
        figure: its name.
        values: one for each piece of work that finished runs have it from, which several may share; of the paper, its
            number.
    """

    cell: Cell
    source: str
    figure: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def std(self) -> float | None:
        """Of the values as a sample; None of a single one."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if self.std is None else f"{self.mean:.4g} ± {self.std:.2g}"


def summarize(sweep: Results) -> list[Row]:
    """Every figure of every cell; cells without a finished run have the paper's only."""
    rows = []
    for cell in sweep.cells:
        done = cell.having("done")
        for figure in dict.fromkeys(name for run in done for name in run.figures):
            by_work = {run.works.get(figure, run.folder): run.figures[figure] for run in done if figure in run.figures}
            rows.append(Row(cell, "measured", figure, tuple(by_work.values())))
        rows += [Row(cell, "paper", figure, (value,)) for figure, value in cell.paper.items()]
    return rows


def write_tables(sweep: Results, rows: list[Row], output: Path) -> str:
    """Write `table.csv` (a line per cell and figure), `runs.csv` (a line per run and figure) and `table.md`.

    Returns:
        The text of table.md.
    """
    header = ["cell", *sweep.axes, "source", "figure", "mean", "std", "n", "failed", "pending"]
    lines = []
    for row in rows:
        spread = "" if row.std is None else row.std
        counts = [len(row.values), *(len(row.cell.having(status)) for status in ("failed", "pending"))]
        numbers = [row.mean, spread, *(counts if row.source != "paper" else ["", "", ""])]
        lines.append([row.cell.name, *_values(sweep, row.cell), row.source, row.figure, *numbers])
    write_text(output / "table.csv", _csv(header, lines))

    header, lines = ["cell", *sweep.axes, "seed", "status", "figure", "value"], []
    for cell in sweep.cells:
        for run in cell.runs:
            start = [cell.name, *_values(sweep, cell), run.seed, run.status]
            lines += [[*start, name, value] for name, value in run.figures.items()] or [[*start, "", ""]]
    write_text(output / "runs.csv", _csv(header, lines))

    text = markdown(sweep, rows)
    write_text(output / "table.md", text)
    return text


def markdown(sweep: Results, rows: list[Row]) -> str:
    """The figures that the study is about, a line per cell, and what is missing."""
    figures = shown_figures(sweep, rows)
    papers = list(dict.fromkeys(row.figure for row in rows if row.source == "paper"))
    found = {(row.cell.name, row.source, row.figure): row for row in rows}
    lines = [f"# {sweep.title}", ""]
    lines += [_line([*sweep.axes, "runs", *figures, *(f"paper: {name}" for name in papers)])]
    lines += ["|" + "---|" * (len(sweep.axes) + 1 + len(figures) + len(papers))]
    for cell in sweep.cells:
        texts = [*_values(sweep, cell), runs_text(cell)]
        texts += [str(found.get((cell.name, "measured", name), "")) for name in figures]
        texts += [str(found.get((cell.name, "paper", name), "")) for name in papers]
        lines.append(_line(texts))
    lines += ["", *(f"{text}  " for text in remarks(sweep))]
    for status in ("failed", "pending"):
        if runs := [run for run in sweep.runs if run.status == status]:
            lines.append(f"{status.capitalize()}: {', '.join(map(_named, runs))}  ")
    return "\n".join(lines) + "\n"


def shown_figures(sweep: Results, rows: list[Row]) -> list[str]:
    """The figures that the sweep names, or all that were measured where it names none."""
    measured = list(dict.fromkeys(row.figure for row in rows if row.source == "measured"))
    return list(sweep.figures) or measured


def runs_text(cell: Cell) -> str:
    """How many of a cell's runs are done: "3", or "1 of 3 (1 failed, 1 pending)"."""
    missing = [f"{count} {status}" for status in ("failed", "pending") if (count := len(cell.having(status)))]
    done = len(cell.having("done"))
    return f"{done} of {len(cell.runs)} ({', '.join(missing)})" if missing else str(done)


def remarks(sweep: Results) -> list[str]:
    """What a reader has to know beside the figures: how often, with what budget, how measured, how much is missing."""
    texts = ["Mean ± standard deviation over the runs of a cell, each of a seed; without ±, of one piece of work."]
    if sweep.budget:
        texts.append(f"Budget: {sweep.budget}")
    if done := [run for run in sweep.runs if run.status == "done"]:
        measured = dict.fromkeys(_protocol_text(protocol) for protocol in done[0].protocols.values())
        texts += [f"Measured: {text}." for text in measured if text]
        if any(cell.paper for cell in sweep.cells) and not any(map(_is_paper_scale, done[0].protocols.values())):
            texts.append(f"Not comparable with the paper's figures: FID of {PAPER_COUNT:,} ImageNet images.")
    stages = [stage for run in sweep.runs for stage in run.stages if stage.status == "done"]
    if any(stage.code for stage in stages):
        texts.append(f"Made by {'; '.join(dict.fromkeys(code_name(stage.code) for stage in stages))}.")
    counts = {status: sum(run.status == status for run in sweep.runs) for status in STATUSES}
    if counts["done"] < len(sweep.runs):
        texts.append(f"Runs: {', '.join(f'{count} {status}' for status, count in counts.items())}.")
    return texts


def _named(run: Run) -> str:
    stage = next((stage.name for stage in run.stages if stage.status == "failed"), None)
    return f"{run.cell} seed {run.seed}" + (f" ({stage})" if stage else "")


def _protocol_text(protocol: dict[str, Any]) -> str:
    facts = (("{} images", "samples", "n"), ("{} of reference", "reference", "n"), ("features {}", "features", "name"))
    parts = [text.format(protocol[part][name]) for text, part, name in facts if name in protocol.get(part, {})]
    parts += [f"{protocol['num_images']} reconstructions"] if "num_images" in protocol else []
    return ", ".join(parts)


def _is_paper_scale(protocol: dict[str, Any]) -> bool:
    inception = protocol.get("features", {}).get("name") == "inception"
    return inception and protocol.get("samples", {}).get("n") == PAPER_COUNT


def value_text(value: Any) -> str:
    """An axis' value as a reader wants it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(sweep: Results, cell: Cell) -> list[str]:
    return [value_text(cell.values[axis]) if axis in cell.values else "" for axis in sweep.axes]


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _csv(header: list[str], lines: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()
