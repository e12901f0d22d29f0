"""`dar compare`: metrics of several evaluations side by side, where their protocols allow it."""

import re

from dar_lightning.errors import UserError, require
from dar_lightning.records.protocol import read_metrics


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
    require(len(names) >= 2, f"--files {files}: give two or more, separated by commas")
    read = [read_metrics(name) for name in names]
    protocols = [protocol for _, protocol in read]
    measured = [{protocol.common_name(name): value for name, value in found.items()} for found, protocol in read]
    headings = {protocols[0].common_name(heading): heading for heading in read[0][0]}
    columns, refused = {}, {}  # common name -> heading of a metric that can be compared; heading -> why one cannot
    for metric, heading in headings.items():
        for name, found, protocol in zip(names[1:], measured[1:], protocols[1:], strict=True):
            if metric not in found:
                refused[heading] = f"{name} does not have {metric}"
            elif unlike := protocols[0].differences(protocol, metric):
                listed = "; ".join(f"{field}: {values}" for field, values in unlike.items())
                refused[heading] = f"{names[0]} and {name} differ in {listed}"
            if heading in refused:
                break
        else:
            columns[metric] = re.sub(r"^[rg](?=F(I?)D)", "", heading)
    if not columns:
        reasons = "; ".join(dict.fromkeys(refused.values())) or f"{names[0]} has none"
        raise UserError(f"--files: no metric can be compared: {reasons}")
    width = max(map(len, names))
    rows = [["infinite" if found[name] is None else f"{found[name]:.4f}" for name in columns] for found in measured]
    for start, row in zip(["", *names], [columns.values(), *rows], strict=True):
        texts = (f"{text:>{max(12, len(heading))}}" for text, heading in zip(row, columns.values(), strict=True))
        print(f"{start:<{width}}", *texts)
    for heading, reason in refused.items():
        print(f"{heading} is left out: {reason}")
