"""The protocol that stands beside every figure, in JSON."""

import json
from pathlib import Path
from typing import Any

from dar_lightning.errors import UserError
from dar_lightning.files import write_text

PAPER_COUNT = 50_000  # images behind each of the paper's figures
FRECHET = "float64, unbiased covariances"


def write_figures(path: str | Path, metrics: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    """Write figures with their protocol as JSON, whole or not at all; returns what was written."""
    result = {"metrics": metrics, "protocol": protocol}
    write_text(path, json.dumps(result, indent=2) + "\n")
    return result


def read_figures(path: str | Path) -> dict[str, Any]:
    """What `write_figures` wrote.

    Raises:
        UserError: the file is missing or something else.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--files: {path} cannot be read ({error}); give files that dar evaluate wrote") from error
    if not isinstance(result, dict) or not all(isinstance(result.get(key), dict) for key in ("metrics", "protocol")):
        raise UserError(f"--files: {path} has no metrics and protocol; give files that dar evaluate wrote")
    return result
