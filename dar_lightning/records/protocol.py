"""The protocol beside every metric: written and read as JSON, and whether two of them allow a comparison."""

import json
import re
from collections.abc import Iterator
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


# What no figure depends on; "versions" is what files had before provenance.
EXPLAINS = ("provenance", "versions")
# kind of figure -> parts of the protocol, and what of the reference
DEPENDS = {
    "FD": (("features", "frechet"), "statistics"),
    "KD": (("features", "kernel_distance"), "images"),
    "precision": (("features", "precision_recall"), "images"),
    "recall": (("features", "precision_recall"), "images"),
    "IS": (("features", "IS"), None),
    "psnr": (("reconstruction.images", "reconstruction.data_range", "reconstruction.psnr"), "images"),
    "ssim": (("reconstruction.images", "reconstruction.data_range", "reconstruction.ssim"), "images"),
    "lpips": (("reconstruction.images", "reconstruction.lpips", "reconstruction.lpips_sha256"), "images"),
    "psnr_own_tokens": (("token_influence",), None),  # whose images it names itself
    "psnr_other_tokens": (("token_influence",), None),
    "psnr_same_tokens": (("token_influence",), None),
    "psnr_exchanged_from_group": (("token_influence",), None),
    "probe_accuracy_samples": (("features", "probe"), None),
    "probe_accuracy_reference": (("features", "probe"), "images"),
}
SET = ("n", "sha256")  # what identifies a set of images


def common_name(name: str, protocol: dict[str, Any]) -> str:
    """A figure's name without its network's and without the callbacks' r or g: FD for FID, rFID and gFD-<name>."""
    network = protocol.get("features", {}).get("name")
    name = name if network is None else name.replace(f"-{network}", "")
    name = re.sub(r"^[rg]?(FID|FD)$", "FD", name)
    name = re.sub(r"^KID", "KD", name)
    return name[1:].lower() if name in ("rPSNR", "rSSIM", "rLPIPS") else name


def differences(name: str, protocol: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """What makes a figure incomparable under two protocols: {field: "value, other value"}, empty if nothing does.

    Args:
        name: its common name; one that is not known here depends on everything but the samples and the provenance.
        protocol: of one file.
        other: of the other.
    """
    mine, theirs = (dict(_facts(name, one)) for one in (protocol, other))
    found = {
        field: f"{_shown(mine.get(field))}, {_shown(theirs.get(field))}"
        for field in sorted(mine.keys() | theirs.keys())
        if mine.get(field) != theirs.get(field) and (field != "reference.n" or (field in mine and field in theirs))
    }
    for field in ("reference.sha256", "probe.train.sha256"):
        if field in mine and mine[field] is None and theirs.get(field) is None:
            found[field] = "written down in neither"
    return found


def _facts(name: str, protocol: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    kind = re.sub(r"(?<=_from_group)_\d+$", "", name.removesuffix("_std"))
    parts, of_reference = DEPENDS.get(kind, (None, "images"))
    if parts is None:
        parts = [part for part in protocol if part not in ("samples", "reference", "image_size", *EXPLAINS)]
    if name != "probe_accuracy_reference":
        yield "samples.n", protocol.get("samples", {}).get("n")
    yield "image_size", protocol.get("image_size")
    for part in parts:
        value = protocol
        for step in part.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        yield from _flat(value, part)
    if of_reference is not None:
        yield from _reference(protocol.get("reference", {}), of_reference == "statistics")


def _reference(reference: dict[str, Any], statistics: bool) -> Iterator[tuple[str, Any]]:
    """What identifies it: pixels, or for a Frechet distance stored statistics, where their pixels are not known."""
    while statistics and "statistics_of" in reference:
        reference = reference["statistics_of"]
    if statistics and "statistics" in reference:
        yield "reference.statistics_sha256", reference.get("statistics_sha256")
        return
    if "statistics" not in reference:  # whose n is another set's
        yield "reference.n", reference.get("n")
    yield "reference.sha256", reference.get("sha256")


def _flat(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield field, value
        return
    is_set = "n" in value and "sha256" in value
    for name, inner in value.items():
        if not is_set or name in SET:
            yield from _flat(inner, f"{field}.{name}")


def _shown(value: Any) -> str:
    """Hashes by their first digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
