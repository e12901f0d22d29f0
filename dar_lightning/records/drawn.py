"""Record of how the images of an npz were sampled: the JSON beside it."""

import json
from pathlib import Path
from typing import Any

from dar_lightning.errors import UserError
from dar_lightning.files import write_json

PIXELS = "pixels_sha256"  # the field by which a record knows its images
NAMES = "class_names"  # the field with the names of all classes, in the order of the labels


def write_drawn(npz: Path, facts: dict[str, Any], sha256: str) -> None:
    """Write `NAME.json` beside `NAME.npz`: how its images were drawn, and their SHA-256 (`records.pixels`)."""
    write_json(npz.with_suffix(".json"), facts | {PIXELS: sha256})


def read_drawn(npz: Path) -> dict[str, Any] | None:
    """`NAME.json` beside `NAME.npz`, if it is such a record."""
    try:
        record = json.loads(npz.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or no JSON
        return None
    return record if npz.suffix == ".npz" and isinstance(record, dict) and PIXELS in record else None


def drawn_facts(npz: Path, option: str, sha256: str) -> dict[str, Any]:
    """What the record says of the images that were measured, for their protocol; UserError if it is of others."""
    record = read_drawn(npz)
    if record is None:
        return {}
    if record[PIXELS] != sha256:
        raise UserError(
            f"{option}: {npz.with_suffix('.json')} tells of other images ({record[PIXELS][:12]}) than {npz} holds "
            f"({sha256[:12]}); delete or rename it, or draw again"
        )
    facts = {name: value for name, value in record.items() if name not in (PIXELS, "n", "image_size", NAMES)}
    return {"steps": facts.pop("num_steps", None)} | facts
