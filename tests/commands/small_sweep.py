"""A sweep whose commands do nothing, see the fixture `runs`."""

import json
from pathlib import Path


def plan(**changes) -> dict:
    """A sweep of two stages; what `weights` does depends on the axis, what `train` does on nothing."""
    return {
        "name": "study",
        "seeds": [0, 1],
        "grid": {"K": [1, 2], "size": {"S": {"width": 8}, "L": {"width": 16}}},
        "stages": {
            "train": {"verb": "extract", "options": {"tokenizer": "t", "shards": "s"}},
            "weights": {"verb": "export", "options": {"ckpt": "{train}/x", "weights": "{K}-{width}-{seed}"}},
        },
    } | changes


ONE = {"seeds": [0], "grid": {"K": [1], "size": {"S": {"width": 8}}}}


def cell(name: str, seed: int = 0) -> dict:
    return json.loads(Path(f"out/cells/{name}/seed{seed}/cell.json").read_text())
