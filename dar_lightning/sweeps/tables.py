"""Tables of a sweep: each metric's mean and spread over seeds, beside the paper's."""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dar_lightning.files import write_text
from dar_lightning.records.protocol import PAPER_COUNT, Protocol
from dar_lightning.records.provenance import code_name
from dar_lightning.sweeps.results import STATUSES, CellResult, SweepResult

CURVES = ("val/loss", "val/flow")  # what the two kinds of training are judged by
GROUPS = re.compile(r"(groups/val_\w+?|written/val_\w+?)_(\d+)$")  # a scalar per group of tokens, or per part written


@dataclass(frozen=True)
class Row:
    """One metric of one cell."""

    cell: CellResult
    source: str  # "measured" (by commands, or in a training's last validation) or "paper"
    metric: str
    values: tuple[float, ...]  # one for each piece of work that finished runs have it from, which several may share

    @property
    def mean(self) -> float:
        """Over the values."""
        return mean(self.values)

    @property
    def std(self) -> float | None:
        """Of the values as a sample; None of a single one."""
        return stdev(self.values) if len(self.values) > 1 else None


def summarize(sweep: SweepResult) -> list[Row]:
    """Every metric of every cell; cells without a finished run have the paper's only."""
    rows = []
    for cell in sweep.cells:
        done = cell.having("done")
        for metric in dict.fromkeys(name for run in done for name in run.metrics):
            by_work = {run.works[metric]: run.metrics[metric] for run in done if metric in run.metrics}
            rows.append(Row(cell, "measured", metric, tuple(by_work.values())))
        rows += [Row(cell, "paper", metric, (value,)) for metric, value in cell.paper.items()]
    return rows


def write_tables(sweep: SweepResult, rows: list[Row], output: Path) -> str:
    """Write `table.csv` (a line per cell and metric), `runs.csv` (per run and metric), `table.md`; returns its text."""
    lines = [["cell", *sweep.axes, "source", "figure", "mean", "std", "n", "failed", "pending"]]
    for row in rows:
        counts = [len(row.values), len(row.cell.having("failed")), len(row.cell.having("pending"))]
        counts = counts if row.source == "measured" else ["", "", ""]
        lines.append([row.cell.name, *_values(row.cell), row.source, row.metric, row.mean, row.std, *counts])
    _write_csv(output / "table.csv", lines)

    lines = [["cell", *sweep.axes, "seed", "status", "figure", "value"]]
    for cell in sweep.cells:
        for run in cell.runs:
            found = run.metrics or {"": ""}
            lines += [[cell.name, *_values(cell), run.seed, run.status, name, value] for name, value in found.items()]
    _write_csv(output / "runs.csv", lines)

    text = markdown(sweep, rows)
    write_text(output / "table.md", text)
    return text


def markdown(sweep: SweepResult, rows: list[Row]) -> str:
    """The metrics that the study is about, a line per cell, and what is missing."""
    metrics = shown_metrics(sweep, rows)
    papers = list(dict.fromkeys(row.metric for row in rows if row.source == "paper"))
    columns = [("measured", name) for name in metrics] + [("paper", name) for name in papers]
    found = {(row.cell.name, row.source, row.metric): spread_text(row.mean, row.std) for row in rows}
    lines = []
    for cell in sweep.cells:
        missing = [f"{len(cell.having(status))} {status}" for status in STATUSES[1:] if cell.having(status)]
        runs = f"{len(cell.having('done'))}" + (f" of {len(cell.runs)} ({', '.join(missing)})" if missing else "")
        lines.append([*_values(cell), runs, *(found.get((cell.name, *column), "") for column in columns)])
    notes = remarks(sweep)
    for status in STATUSES[1:]:
        names = []
        for run in (run for run in sweep.runs if run.status == status):
            stage = next((f" ({stage.name})" for stage in run.stages if stage.status == "failed"), "")
            names.append(f"{run.cell} seed {run.seed}{stage}")
        notes += [f"{status.capitalize()}: {', '.join(names)}"] if names else []
    header = [*sweep.axes, "runs", *metrics, *(f"paper: {name}" for name in papers)]
    table = markdown_table(header, lines)
    return "\n".join([f"# {sweep.title}", "", *table, "", *(f"{note}  " for note in notes)]) + "\n"


def markdown_table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def spread_text(mean: float, std: float | None) -> str:
    """0.11 ± 0.01"""
    return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"


def shown_metrics(sweep: SweepResult, rows: list[Row]) -> list[str]:
    """The metrics that the sweep names, or all that were measured where it names none."""
    return list(sweep.metrics or dict.fromkeys(row.metric for row in rows if row.source == "measured"))


def remarks(sweep: SweepResult) -> list[str]:
    """What a reader has to know beside the metrics: how often, with what budget, how measured, how much is missing."""
    texts = ["Mean ± standard deviation over the runs of a cell, each of a seed; without ±, of one piece of work."]
    if sweep.budget:
        texts.append(f"Budget: {sweep.budget}")
    if done := [run for run in sweep.runs if run.status == "done"]:
        protocols = done[0].protocols.values()
        texts += [f"Measured: {text}." for text in dict.fromkeys(map(_protocol_text, protocols)) if text]
        paper_scale = any(
            protocol.methods.get("features", {}).get("name") == "inception" and protocol.samples.get("n") == PAPER_COUNT
            for protocol in protocols
        )
        if any(cell.paper for cell in sweep.cells) and not paper_scale:
            texts.append(f"Not comparable with the paper's numbers: FID of {PAPER_COUNT:,} ImageNet images.")
    codes = [stage.code for run in sweep.runs for stage in run.stages if stage.status == "done"]
    if any(codes):
        texts.append(f"Made by {'; '.join(dict.fromkeys(map(code_name, codes)))}.")
    counts = {status: sum(run.status == status for run in sweep.runs) for status in STATUSES}
    if counts["done"] < len(sweep.runs):
        texts.append(f"Runs: {', '.join(f'{count} {status}' for status, count in counts.items())}.")
    return texts


def is_number(value: Any) -> bool:
    """Whether an axis' value counts; true and false do not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_text(value: Any) -> str:
    """An axis' value as a reader wants it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _protocol_text(protocol: Protocol) -> str:
    what = "reconstructions" if "reconstructions" in protocol.samples else "images"
    facts = [(f"{{}} {what}", protocol.samples, "n")]
    if what == "images":
        facts.append(("{} of reference", protocol.reference, "n"))
    facts.append(("features {}", protocol.methods.get("features", {}), "name"))
    return ", ".join(text.format(part[name]) for text, part, name in facts if name in part)


def _values(cell: CellResult) -> list[str]:
    return [value_text(value) for value in cell.values.values()]


def _write_csv(path: Path, lines: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(path, text.getvalue())
