"""Metrics with their protocol: one JSON format, and whether two protocols allow a comparison."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dar_lightning.errors import UserError
from dar_lightning.files import write_json

PAPER_COUNT = 50_000  # images behind each of the paper's FIDs
FRECHET = "float64, unbiased covariances"

# Metric -> the methods that its value depends on, and what of the reference.
DEPENDS = {
    "FD": (("features", "frechet"), ("statistics",)),
    "KD": (("features", "kernel_distance"), ("images",)),
    "precision": (("features", "precision_recall"), ("images",)),
    "recall": (("features", "precision_recall"), ("images",)),
    "IS": (("features", "IS"), ()),
    "psnr": (("reconstruction.images", "reconstruction.data_range", "reconstruction.psnr"), ("images",)),
    "ssim": (("reconstruction.images", "reconstruction.data_range", "reconstruction.ssim"), ("images",)),
    "lpips": (("reconstruction.images", "reconstruction.lpips", "reconstruction.lpips_sha256"), ("images",)),
    "psnr_exchanged_from_group": (("token_influence",), ()),  # names its images itself
    **{f"psnr_{whose}_tokens": (("token_influence",), ()) for whose in ("own", "other", "same")},
    "probe_accuracy_samples": (("features", "probe"), ()),
    "probe_accuracy_reference": (("features", "probe"), ("images",)),
    "clip_score_samples": (("clip.sha256", "clip_captions_sha256.samples"), ()),
    "clip_score_reference": (("clip.sha256", "clip_captions_sha256.reference"), ("images",)),
}
IDENTITIES = ("reference.sha256", "probe.train.sha256")


@dataclass(frozen=True)
class Protocol:
    """What metrics depend on.

    Attributes:
        samples: how the measured images were made, their number `n` and their `sha256`.
        reference: what they are compared with: `n` and `sha256` of images, or stored `statistics`.
        image_size: [H, W].
        methods: how metrics are computed, by part: `features`, `frechet`, `reconstruction`, `probe`, ...
        provenance: which code measured (`records.provenance`); it explains a value, and none depends on it.
    """

    samples: dict[str, Any]
    reference: dict[str, Any]
    image_size: list[int] | None
    methods: dict[str, Any]
    provenance: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Protocol":
        """From the protocol of a JSON file."""
        rest = dict(values)
        sets = {name: rest.pop(name, None) or {} for name in ("samples", "reference")}
        others = {name: rest.pop(name, None) for name in ("image_size", "provenance")}
        return cls(**sets, **others, methods=rest)

    def to_json(self) -> dict[str, Any]:
        """As it stands in files: the methods beside the rest."""
        fields = {"samples": self.samples, "reference": self.reference, "image_size": self.image_size}
        return fields | self.methods | {"provenance": self.provenance}

    def common_name(self, metric: str) -> str:
        """A metric's name without its network's and without the callbacks' r or g: FD for FID, rFID and gFD-NAME."""
        network = self.methods.get("features", {}).get("name")
        name = metric if network is None else metric.replace(f"-{network}", "")
        name = re.sub(r"^[rg]?(FID|FD)$", "FD", name)
        name = re.sub(r"^KID", "KD", name)
        return name[1:].lower() if name in ("rPSNR", "rSSIM", "rLPIPS") else name

    def differences(self, other: "Protocol", metric: str | None = None) -> dict[str, str]:
        """What makes a metric incomparable under two protocols: {field: "value, other value"}, empty if nothing does.

        Args:
            other: the other protocol.
            metric: its common name. One that is not known here, and None, which stands for all of one measurement,
                depends on everything but how the samples were made, and on no provenance. With a name, images that
                neither protocol identifies by a hash differ.
        """
        mine, theirs = (dict(one._facts(metric)) for one in (self, other))
        found = {
            field: f"{_shown(mine.get(field))}, {_shown(theirs.get(field))}"
            for field in sorted(mine.keys() | theirs.keys())
            if mine.get(field) != theirs.get(field) and (field != "reference.n" or (field in mine and field in theirs))
        }
        for field in IDENTITIES if metric is not None else ():
            if field in mine and mine[field] is None and theirs.get(field) is None:
                found[field] = "written down in neither"
        return found

    def _facts(self, metric: str | None) -> Iterator[tuple[str, Any]]:
        """The fields that decide a metric, as "part.field" and value."""
        known = re.sub(r"(?<=_from_group)_\d+$", "", (metric or "").removesuffix("_std"))
        parts, kinds = DEPENDS.get(known, (self.methods, ("images", "statistics")))
        if metric not in ("probe_accuracy_reference", "clip_score_reference"):
            yield "samples.n", self.samples.get("n")
        yield "image_size", self.image_size
        for part in parts:
            value = self.methods
            for step in part.split("."):
                value = value.get(step) if isinstance(value, dict) else None
            yield from _flat(value, part)
        for kind in kinds:
            yield from _identity(self.reference, kind)


def write_metrics(path: str | Path, metrics: dict[str, float | None], protocol: Protocol) -> dict[str, Any]:
    """Write metrics and their protocol as JSON, atomically; returns what was written."""
    result = {"metrics": metrics, "protocol": protocol.to_json()}
    write_json(path, result)
    return result


def read_metrics(path: str | Path) -> tuple[dict[str, float | None], Protocol]:
    """The metrics and the protocol of a file; UserError if it is missing or something else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        return dict(result["metrics"]), Protocol.from_json(result["protocol"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{path} has no metrics and protocol ({error!r}); give files that dar evaluate wrote"
        raise UserError(f"--files: {reason}") from error


def _identity(reference: dict[str, Any], kind: str) -> Iterator[tuple[str, Any]]:
    """What identifies a reference: its pixels, or the stored statistics of it, where their pixels are not known."""
    while kind == "statistics" and "statistics_of" in reference:
        reference = reference["statistics_of"]
    if kind == "statistics" and "statistics" in reference:
        yield "reference.statistics_sha256", reference.get("statistics_sha256")
        return
    if "statistics" not in reference:  # whose n is another set's
        yield "reference.n", reference.get("n")
        if "sha256" not in reference:
            yield from _flat(reference, "reference")
    yield "reference.sha256", reference.get("sha256")


def _flat(value: Any, field: str) -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries; of a set of images with a hash, `n` and `sha256` alone."""
    if not isinstance(value, dict):
        yield field, value
        return
    is_set = "n" in value and "sha256" in value
    for name, inner in value.items():
        if not is_set or name in ("n", "sha256"):
            yield from _flat(inner, f"{field}.{name}")


def _shown(value: Any) -> str:
    """Hashes by their first digits."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)
