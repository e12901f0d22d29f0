"""Finished stages of a sweep: which code and data made them, and whether to run them again."""

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import Any

from dar_lightning.files import read_json
from dar_lightning.records.provenance import FILE, read_code
from dar_lightning.sweeps.plan import Work

DONE, BEGUN, LOCK = "done.json", "begun.json", ".sweep.lock"


def read_done(work: Work, root: Path, name: str = DONE) -> dict[str, Any] | None:
    """The record of a finished stage in a sweep's folder, None of another; or what it was begun from, in BEGUN."""
    path = root / work.folder / name
    return read_json(path) if path.exists() else None


def made_from(work: Work, root: Path) -> dict[str, Any]:
    """What decides the results of a stage that begins, beside its hash: code, data, and what made what it needs."""
    needs = {name: _mark(read_done(need, root)) for name, need in work.needs.items()}
    return {"code": read_code(), "data": work.data(), "needs": needs}


def code_hashes(work: Work, root: Path) -> list[str]:
    """Hashes of the code that worked in a stage's folder, where the verb notes it: an interrupted stage has several."""
    paths = [root / work.folder / place / FILE for place in ("", "tensorboard")]
    made = [one for path in paths if path.is_file() for one in json.loads(path.read_text(encoding="utf-8"))]
    return sorted({str(one["code"]["sha256"]) for one in made})


def is_of_others(work: Work, root: Path, code: str) -> bool:
    """Whether a stage is finished or begun, and other code than that of this hash, or other data, made it."""
    done = read_done(work, root)
    if done is None:
        begun = read_done(work, root, BEGUN)
        return not {*code_hashes(work, root)} <= {code} or (begun is not None and begun["data"] != work.data())
    made = done.get("made")  # not noted by versions before
    return made is None or {made["code"]["sha256"], *made["codes"]} != {code} or made["data"] != work.data()


def is_outdated(work: Work, root: Path, wanted: str | None) -> bool:
    """Whether a stage must begin anew: other code or data than wanted made it, or what it needs is or was made anew.

    `wanted` is the hash of the code that it must be of, with today's data; None where any is as good.
    """
    if wanted is not None and is_of_others(work, root, wanted):
        return True
    done = read_done(work, root)
    made = read_done(work, root, BEGUN) if done is None else done.get("made", {"needs": dict.fromkeys(work.needs)})
    if made is None:
        return False
    found = {name: read_done(need, root) for name, need in work.needs.items()}
    return any(
        is_outdated(need, root, wanted) or (found[name] is not None and _mark(found[name]) != made["needs"][name])
        for name, need in work.needs.items()
    )


def put_aside(work: Work, root: Path) -> Path:
    """Move a stage's results to a folder of `replaced`: a training would go on from its checkpoint."""
    folder, names = root / work.folder, (root / "replaced" / f"{Path(work.folder).name}-{n}" for n in count(1))
    place = next(name for name in names if not name.exists())
    place.mkdir(parents=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == DONE):  # killed before, it does so again
        if path.name != LOCK:
            path.rename(place / path.name)
    return place


def _mark(done: dict[str, Any] | None) -> str | None:
    """What made a finished stage, as one hash; None where it was not noted."""
    if done is None or "made" not in done:
        return None
    made = done["made"] | {"code": done["made"]["code"]["sha256"]}  # a commit that changes no code changes nothing
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
