"""`dar compare`: metrics of several evaluations side by side, where their protocols allow it."""

import re

from dar_lightning.errors import UserError
from dar_lightning.records.protocol import Protocol, read_metrics

Measured = tuple[str, dict[str, float | None], Protocol]  # a file's name, its metrics by common name, its protocol


def compare(files: str) -> None:
    """Print the metrics of evaluations in a table, and say which cannot be compared and why.

    A metric is in the table if all files have it, under protocols that agree in everything its number depends on:
    feature network, reference, number of images, size and method. What else they hold does not matter.

    Args:
        files: two or more JSON files that `dar evaluate`, `dar reconstruct` or the FID callbacks wrote, separated by
            commas.

    Raises:
        UserError: there is no such metric; it names all that they differ in.
    """
    names = [name.strip() for name in files.split(",")]
    if len(names) < 2:
        raise UserError(f"--files {files}: give two or more, separated by commas")
    files_read = [(name, *read_metrics(name)) for name in names]
    measured: list[Measured] = [
        (name, {protocol.common_name(metric): value for metric, value in metrics.items()}, protocol)
        for name, metrics, protocol in files_read
    ]
    _, metrics, protocol = files_read[0]
    headings = {protocol.common_name(metric): metric for metric in metrics}
    columns, refused = {}, {}  # headings of the metrics that can be compared; reasons for those that cannot
    for metric, shown in headings.items():
        reason = next(filter(None, (_why_not(metric, measured[0], other) for other in measured[1:])), None)
        if reason is None:
            columns[metric] = re.sub(r"^[rg](?=F(I?)D)", "", shown)
        else:
            refused[shown] = reason
    if not columns:
        reasons = "; ".join(dict.fromkeys(refused.values())) or f"{names[0]} has none"
        raise UserError(f"--files: no metric can be compared: {reasons}")
    width = max(map(len, names))
    widths = {metric: max(12, len(heading)) for metric, heading in columns.items()}
    print(" " * width, *(f"{heading:>{widths[metric]}}" for metric, heading in columns.items()))
    for name, metrics, _ in measured:
        texts = {metric: "infinite" if metrics[metric] is None else f"{metrics[metric]:.4f}" for metric in columns}
        print(f"{name:<{width}}", *(f"{text:>{widths[metric]}}" for metric, text in texts.items()))
    for shown, reason in refused.items():
        print(f"{shown} is left out: {reason}")


def _why_not(metric: str, first: Measured, other: Measured) -> str | None:
    """Why a metric, by its common name, cannot be compared between two files; None if it can."""
    if metric not in other[1]:
        return f"{other[0]} does not have {metric}"
    found = first[2].differences(other[2], metric)
    listed = "; ".join(f"{field}: {values}" for field, values in found.items())
    return f"{first[0]} and {other[0]} differ in {listed}" if found else None
