"""The protocol that stands beside every figure, and whether two figures have the same one."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dar_lightning import __version__
from dar_lightning.errors import UserError
from dar_lightning.files import write_text

FRECHET = "float64, unbiased covariances"
PLACES = ("npz", "folder", "shards", "statistics_of")  # of a set that a hash identifies


def versions() -> dict[str, str]:
    """Of the packages that figures may depend on."""
    found = {"dar_lightning": __version__}
    for name in ("torch", "torchmetrics", "torchvision", "timm", "torch-fidelity"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # torch-fidelity is optional
            continue
    return found


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


def first_difference(protocol: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What makes figures of two protocols incomparable: "field: value, other value", or None if nothing does.

    How the samples were made is what figures compare: of them, only the number must be equal. Sets with hashes may lie
    anywhere. Versions may differ; they are kept to explain what nothing else does.
    """
    mine, theirs = _comparable(protocol), _comparable(other)
    for field in sorted(mine.keys() | theirs.keys()):
        if mine.get(field) != theirs.get(field):
            return f"{field}: {mine.get(field)}, {theirs.get(field)}"
    return None


def _comparable(protocol: dict[str, Any]) -> dict[str, Any]:
    samples = {"n": protocol.get("samples", {}).get("n")}
    rest = {name: value for name, value in protocol.items() if name not in ("samples", "versions")}
    return dict(_flat({"samples": samples} | rest, ""))


def _flat(values: dict[str, Any], prefix: str):
    identified = "sha256" in values or "statistics_sha256" in values
    for name, value in values.items():
        if identified and name in PLACES:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
