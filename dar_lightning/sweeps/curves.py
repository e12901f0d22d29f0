"""Reading scalar curves from TensorBoard event files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVENTS = "events.out.tfevents.*"


class Curve(NamedTuple):
    """One scalar over training."""

    steps: np.ndarray  # (n,) int64, ascending
    values: np.ndarray  # (n,) float64


def event_folders(folder: str | Path) -> list[Path]:
    """The folders at or under `folder` that hold event files."""
    return sorted({path.parent for path in Path(folder).rglob(EVENTS)})


def read_scalars(folder: str | Path) -> dict[str, Curve]:
    """Every scalar that was logged at or under a folder, by tag; of a step that was logged again, the last."""
    points: dict[str, dict[int, float]] = {}
    for place in event_folders(folder):
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()  # 0: all of them
        for tag in events.Tags()["scalars"]:
            points.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    curves = {tag: zip(*sorted(found.items()), strict=True) for tag, found in sorted(points.items())}
    return {tag: Curve(*map(np.array, pair)) for tag, pair in curves.items()}


def last_scalars(folder: Path, prefixes: tuple[str, ...]) -> dict[str, float]:
    """The last value of each scalar whose name starts with one of the prefixes."""
    found = read_scalars(folder).items()
    return {name: float(curve.values[-1]) for name, curve in found if name.startswith(prefixes)}
