"""The runs of a sweep: each stage once, whichever cells share it, and anew where other code or data made it."""

import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

from dar_lightning.errors import UserError, naming
from dar_lightning.files import read_json, write_json, write_text
from dar_lightning.generation.grids import mosaic, save_png
from dar_lightning.metrics.images import NpzImages
from dar_lightning.records.provenance import FILE, read_code
from dar_lightning.sweeps.child import call
from dar_lightning.sweeps.curves import last_scalars
from dar_lightning.sweeps.plan import Cell, Sweep, Work
from dar_lightning.sweeps.results import METRICS, RUN, SAMPLES, SWEEP, run_folder

PROGRAM = [sys.executable, "-m", "dar_lightning"]
DONE, BEGUN, LOCK, LOG = "done.json", "begun.json", ".sweep.lock", "log.txt"
SCALARS = ("val/", "groups/val_", "written/val_")  # what metrics.json takes from a training's logs
REPORTS = {"evaluate": "evaluation.json", "reconstruct": "reconstruction.json"}
PICTURES = {"sample": "samples.png", "reconstruct": "reconstructions.png"}
TABLE_IMAGES = 64  # of its first row and seed, for samples.png where no stage makes a picture


class Runner:
    """Runs the cells of a sweep in its folder.

    `wanted` is the hash of the code that all results must be of, with today's data; None where any is as good.
    """

    def __init__(self, plan: Sweep, root: Path, wanted: str | None = None) -> None:
        self.plan, self.root, self.wanted = plan, root, wanted
        self.tried: dict[str, str] = {}  # hash -> done or failed; a cell that needs the same does not try again

    def prepare(self) -> None:
        """Make the folder, or go on in one of the same sweep; a cell that is not as planned is pending again."""
        mark = self.root / SWEEP  # it comes first, so that another process finds nothing else without it
        with naming("output", OSError):
            self.root.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(".") for path in self.root.iterdir()) and not mark.exists():
            raise UserError(f"output: {self.root} holds other files, give a new folder")
        with FileLock(self.root / LOCK):
            if mark.exists() and (name := read_json(mark).get("name")) != self.plan.name:
                raise UserError(f"output: {self.root} is of the sweep {name}, give another folder")
            write_json(mark, self.plan.summary())
            text = yaml.safe_dump(asdict(self.plan), sort_keys=False, allow_unicode=True, width=120)
            write_text(self.root / "sweep.yaml", text)
            for cell, seed in self.plan.runs():
                self._prepare_cell(cell, seed)

    def run(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Run the stages of a cell until one fails; returns what cell.json says."""
        works, done = self.plan.work(cell, seed), {}
        for name, work in works.items():
            done[name] = self._run_work(work)
            state = self._record(cell, seed, done)
            if done[name]["status"] == "failed":
                return state
        _collect(list(works.values()), self.root, run_folder(self.root, cell.name, seed))
        return state

    def _prepare_cell(self, cell: Cell, seed: int) -> None:
        folder, works = run_folder(self.root, cell.name, seed), self.plan.work(cell, seed)
        if (folder / RUN).exists():
            before = {stage["name"]: stage for stage in read_json(folder / RUN)["stages"]}
            changed = [name for name in works if name not in before or before[name]["hash"] != works[name].hash]
            same = not changed and before.keys() == works.keys()
            if same and not any(is_outdated(work, self.root, self.wanted) for work in works.values()):
                return
            for name in [name for name in changed if before.get(name, {}).get("status") == "done"][:1]:
                what = f"{name} has changed since it was done in {before[name]['folder']}"
                print(f"  {what}: it is to be done again ({cell.name} seed {seed})", flush=True)
        for result in (METRICS, SAMPLES):  # metrics of another config would mislead
            (folder / result).unlink(missing_ok=True)
        self._record(cell, seed, {})

    def _record(self, cell: Cell, seed: int, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write cell.json; `done` is state and seconds of stages by name, others are pending."""
        stages = [
            {"name": name, "folder": work.folder, "command": ["dar", *work.command(self.root)], "hash": work.hash}
            | done.get(name, {"status": "pending", "seconds": None})
            for name, work in self.plan.work(cell, seed).items()
        ]
        found = {stage["status"] for stage in stages}
        status = next(status for status in ("failed", "pending", "done") if status in found)
        state = {"cell": cell.name, "seed": seed, "values": cell.values, "status": status, "stages": stages}
        write_json(run_folder(self.root, cell.name, seed) / RUN, state)
        return state

    def _run_work(self, work: Work) -> dict[str, Any]:
        """Do a stage, unless it is done; other processes that need the same wait."""
        folder = self.root / work.folder
        if self.tried.get(work.hash) == "failed":
            print(f"  {work.stage}  failed before: {folder / LOG}", flush=True)
            return {"status": "failed", "seconds": None}
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            print(f"  {work.stage}  waits for another process, which does {work.folder}", flush=True)
            held = lock.acquire()
        with held:
            done = read_done(work, self.root)
            again = work.hash not in self.tried and is_outdated(work, self.root, self.wanted)
            if again:
                print(f"  {work.stage}  is made anew; what it was: {_put_aside(folder, self.root)}", flush=True)
            if done is None or again:
                return self._execute(work, lock)
            print(f"  {work.stage}  done already: {folder}", flush=True)
            return {"status": "done", "seconds": done["seconds"], "code": done["made"]["code"]}

    def _execute(self, work: Work, lock: FileLock) -> dict[str, Any]:
        folder, command = self.root / work.folder, work.command(self.root)
        needs = {name: _mark(need, self.root) for name, need in work.needs.items()}
        made = {"code": read_code(), "data": work.data(), "needs": needs}  # what decides its results, beside its hash
        write_text(folder / "config.yaml", yaml.safe_dump({"verb": work.verb, "options": command[1:]}, width=120))
        if not (folder / BEGUN).exists():  # an interrupted training goes on from what it was begun from
            write_json(folder / BEGUN, made, indent=None)
        start = time.monotonic()
        with open(folder / LOG, "a", encoding="utf-8") as log:
            print("$", shlex.join(["dar", *command]), file=log, flush=True)
            status, stopped = _call([*PROGRAM, *command], log, lock)
        seconds = round(time.monotonic() - start, 1)
        if status and not stopped:
            self.tried[work.hash] = "failed"
            last = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            print(f"  {work.stage}  failed with status {status}: {last} ({folder / LOG})", flush=True)
            return {"status": "failed", "seconds": seconds}
        if not status:
            if (resolved := folder / "tensorboard/config.yaml").exists():  # Lightning's, every value that it used
                shutil.copyfile(resolved, folder / "config.yaml")
            done = {"hash": work.hash, "command": command, "seconds": seconds}
            done["made"] = made | {"codes": sorted(_noted_codes(folder))}
            write_json(folder / DONE, done, indent=None)
            self.tried[work.hash] = "done"
            print(f"  {work.stage}  {seconds:.0f} s: {folder}", flush=True)
        if stopped:
            print(f"  {work.stage}  {signal.Signals(stopped).name}: stopped; start again to go on", flush=True)
            sys.exit(128 + stopped)
        return {"status": "done", "seconds": seconds, "code": made["code"]}


def read_done(work: Work, root: Path) -> dict[str, Any] | None:
    """The record of a finished stage in a sweep's folder, None of another."""
    path = root / work.folder / DONE
    return read_json(path) if path.exists() else None


def is_of_others(work: Work, root: Path, code: str) -> bool:
    """Whether a stage is finished or begun, and other code than that of this hash, or other data, made it."""
    made = _made(work, root)
    if made is None:
        return False
    begun = read_done(work, root) is None
    codes = _noted_codes(root / work.folder) if begun else {made["code"]["sha256"], *made["codes"]}
    return bool(codes - {code}) or made["data"] != work.data()


def is_outdated(work: Work, root: Path, wanted: str | None) -> bool:
    """Whether a stage must begin anew: other code or data than wanted made it, or what it needs is or was made anew.

    `wanted` is the hash of the code that it must be of, with today's data; None where any is as good.
    """
    if wanted is not None and is_of_others(work, root, wanted):
        return True
    made = _made(work, root)
    return made is not None and any(
        is_outdated(need, root, wanted) or _mark(need, root) not in (None, made["needs"][name])
        for name, need in work.needs.items()
    )


def _made(work: Work, root: Path) -> dict[str, Any] | None:
    """What a finished or begun stage was made from; None of another."""
    done, begun = read_done(work, root), root / work.folder / BEGUN
    if done is not None:
        return done["made"]
    return read_json(begun) if begun.exists() else None


def _mark(work: Work, root: Path) -> str | None:
    """What made a finished stage, as one hash."""
    done = read_done(work, root)
    if done is None:
        return None
    made = done["made"] | {"code": done["made"]["code"]["sha256"]}  # a commit that changes no code changes nothing
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def _noted_codes(folder: Path) -> set[str]:
    """Hashes of the code that worked in a stage's folder, where the verb notes it: an interrupted stage has several."""
    paths = [folder / place / FILE for place in ("", "tensorboard")]
    made = [one for path in paths if path.is_file() for one in json.loads(path.read_text(encoding="utf-8"))]
    return {str(one["code"]["sha256"]) for one in made}


def _put_aside(folder: Path, root: Path) -> Path:
    """Move a stage's results to a folder of `replaced`: a training would go on from its checkpoint."""
    names = (root / "replaced" / f"{folder.name}-{n}" for n in count(1))
    place = next(name for name in names if not name.exists())
    place.mkdir(parents=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == DONE):  # killed before, it does so again
        if path.name != LOCK:
            path.rename(place / path.name)
    return place


def _call(words: list[str], log: IO[str], lock: FileLock) -> tuple[int, int]:
    """Run a command to its end; its exit status, and the signal that asked this process to stop meanwhile, or 0.

    The command also holds the lock: should this process be killed, another one that needs the folder waits for it.
    """
    return call(words, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock._context.lock_file_fd])


def _collect(works: list[Work], root: Path, folder: Path) -> None:
    """metrics.json and samples.png of a cell whose stages are done; later stages take the place of earlier ones."""
    metrics: dict[str, float | None] = {}
    stages: dict[str, str] = {}  # metric -> the stage that measured it
    protocols: dict[str, Any] = {}
    for work in works:
        place, found = root / work.folder, {}
        if work.verb == "fit":
            found = last_scalars(place / "tensorboard", SCALARS)
            for path in sorted(place.glob("evaluation/*.json")):  # NAME-STEP, by the FID callbacks; the last step stays
                protocols[f"{work.stage}, val/{path.stem.rpartition('-')[0]}"] = read_json(path)["protocol"]
        elif work.verb in REPORTS:
            report = read_json(place / REPORTS[work.verb])
            found, protocols[work.stage] = report["metrics"], report["protocol"]
        elif work.verb == "table":
            row = read_json(place / "table.json")["rows"][0]
            prefix = "r" if "--task=reconstruct" in work.words else "g"  # rFID and gFID may both be of one cell
            means = {name: metric["mean"] for name, metric in row["metrics"].items()}
            found = {f"{prefix}{name}" if name.startswith("F") else name: mean for name, mean in means.items()}
            protocols[work.stage] = row["protocol"]
            drawn = place / f"row0/seed{row['seeds'][0]}/samples.npz"
            if drawn.is_file() and not any(other.verb in PICTURES for other in works):
                save_png(mosaic(next(NpzImages(drawn, work.stage).batches(TABLE_IMAGES))[0]), folder / SAMPLES)
        metrics |= found
        stages |= dict.fromkeys(found, work.stage)
        if work.verb in PICTURES:
            shutil.copyfile(place / PICTURES[work.verb], folder / SAMPLES)
    told = {"figures": metrics, "stages": stages, "protocol": protocols}
    write_json(folder / METRICS, told)
