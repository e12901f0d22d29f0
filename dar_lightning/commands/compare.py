"""`dar compare`: figures of several evaluations side by side, if their protocols allow it."""

from dar_lightning.errors import UserError
from dar_lightning.metrics.protocol import first_difference, read_figures


def compare(files: str) -> None:
    """Print the figures of evaluations in a table, or say why they cannot be compared.

    Args:
        files: two or more JSON files that `dar evaluate` or the FID callbacks wrote, separated by commas.

    Raises:
        UserError: two of them differ in feature network, reference, number of images, size or another part of their
            protocol; it names the first such part.
    """
    names = [name.strip() for name in files.split(",")]
    if len(names) < 2:
        raise UserError(f"--files {files}: give two or more, separated by commas")
    results = [read_figures(name) for name in names]
    for name, result in zip(names[1:], results[1:], strict=True):
        difference = first_difference(results[0]["protocol"], result["protocol"])
        if difference is not None:
            raise UserError(f"--files: {names[0]} and {name} cannot be compared, they differ in {difference}")
    figures = [figure for figure in results[0]["metrics"] if all(figure in result["metrics"] for result in results)]
    if not figures:
        raise UserError(f"--files {files}: they have no figure in common")
    width = max(map(len, names))
    print(" " * width, *(f"{figure:>{max(12, len(figure))}}" for figure in figures))
    for name, result in zip(names, results, strict=True):
        cells = (_cell(result["metrics"][figure], max(12, len(figure))) for figure in figures)
        print(f"{name:<{width}}", *cells)


def _cell(value: float | None, width: int) -> str:
    return f"{'infinite' if value is None else f'{value:.4f}':>{width}}"
