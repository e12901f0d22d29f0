"""`dar compare`: figures of several evaluations side by side, where their protocols allow it."""

import re
from typing import Any

from dar_lightning.errors import UserError
from dar_lightning.records.protocol import common_name, differences, read_figures


def compare(files: str) -> None:
    """Print the figures of evaluations in a table, and say which cannot be compared and why.

    A figure is in the table if all files have it, under protocols that agree in everything its number depends on:
    feature network, reference, number of images, size and method. What else they hold does not matter.

    Args:
        files: two or more JSON files that `dar evaluate`, `dar reconstruct` or the FID callbacks wrote, separated by
            commas.

    Raises:
        UserError: there is no such figure; it names all that they differ in.
    """
    names = [name.strip() for name in files.split(",")]
    if len(names) < 2:
        raise UserError(f"--files {files}: give two or more, separated by commas")
    (name, first), *others = files_read = [(name, read_figures(name)) for name in names]
    columns, refused = {}, {}  # headings of the figures that can be compared; reasons for those that cannot
    for shown in first["metrics"]:
        figure = common_name(shown, first["protocol"])
        reason = next(filter(None, (_why_not(figure, name, first, *other) for other in others)), None)
        if reason is None:
            columns[figure] = re.sub(r"^[rg](?=F(I?)D)", "", shown)
        else:
            refused[shown] = reason
    if not columns:
        reasons = "; ".join(dict.fromkeys(refused.values())) or f"{name} has none"
        raise UserError(f"--files: no figure can be compared: {reasons}")
    width = max(map(len, names))
    widths = {figure: max(12, len(heading)) for figure, heading in columns.items()}
    print(" " * width, *(f"{heading:>{widths[figure]}}" for figure, heading in columns.items()))
    for name, result in files_read:
        values = _by_common_name(result)
        print(f"{name:<{width}}", *(_cell(values[figure], widths[figure]) for figure in columns))
    for shown, reason in refused.items():
        print(f"{shown} is left out: {reason}")


def _why_not(figure: str, name: str, first: dict[str, Any], other_name: str, other: dict[str, Any]) -> str | None:
    """Why a figure, by its common name, cannot be compared between two files; None if it can."""
    found = differences(figure, first["protocol"], other["protocol"])
    if figure not in _by_common_name(other):
        return f"{other_name} does not have {figure}"
    if found:
        listed = "; ".join(f"{field}: {values}" for field, values in found.items())
        return f"{name} and {other_name} differ in {listed}"
    return None


def _by_common_name(result: dict[str, Any]) -> dict[str, float | None]:
    return {common_name(name, result["protocol"]): value for name, value in result["metrics"].items()}


def _cell(value: float | None, width: int) -> str:
    return f"{'infinite' if value is None else f'{value:.4f}':>{width}}"
