"""The runs of a sweep: each stage once, whichever cells share it, with its results in the sweep's folder."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

from dar_lightning.errors import UserError
from dar_lightning.files import read_json, users_path, write_text
from dar_lightning.generation.grids import mosaic, save_png
from dar_lightning.metrics.images import NpzImages
from dar_lightning.sweeps.child import call
from dar_lightning.sweeps.curves import last_scalars
from dar_lightning.sweeps.finished import BEGUN, DONE, LOCK, code_hashes, is_outdated, made_from, put_aside, read_done
from dar_lightning.sweeps.plan import Cell, Sweep, Work, shown
from dar_lightning.sweeps.results import METRICS, RUN, SAMPLES, SWEEP, run_folder

PROGRAM = [sys.executable, "-m", "dar_lightning"]
LOG = "log.txt"
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
        with users_path("output"):
            self.root.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(".") for path in self.root.iterdir()) and not mark.exists():
            raise UserError(f"output: {self.root} holds other files, give a new folder")
        with FileLock(self.root / LOCK):
            if mark.exists() and read_json(mark).get("name") != self.plan.name:
                name = read_json(mark).get("name")
                raise UserError(f"output: {self.root} is of the sweep {name}, give another folder")
            write_text(mark, json.dumps(self.plan.summary(), indent=2) + "\n")
            settings = vars(self.plan) | {"stages": {name: vars(stage) for name, stage in self.plan.stages.items()}}
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120)
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
            hashes = {name: work.hash for name, work in works.items()}
            same = {name: stage["hash"] for name, stage in before.items()} == hashes
            if same and not any(is_outdated(work, self.root, self.wanted) for work in works.values()):
                return
            changed = [
                f"{name} has changed since it was done in {before[name]['folder']}"
                for name in works
                if name in before and before[name]["status"] == "done" and before[name]["hash"] != hashes[name]
            ]
            if changed:
                print(f"  {changed[0]}: it is to be done again ({cell.name} seed {seed})", flush=True)
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
        status = "failed" if "failed" in found else "pending" if "pending" in found else "done"
        state = {"cell": cell.name, "seed": seed, "values": cell.values, "status": status, "stages": stages}
        write_text(run_folder(self.root, cell.name, seed) / RUN, json.dumps(state, indent=2) + "\n")
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
            if done is not None and not again:
                print(f"  {work.stage}  done already: {folder}", flush=True)
                return _state(done)
            if again:
                print(f"  {work.stage}  is made anew; what it was: {put_aside(work, self.root)}", flush=True)
            return self._execute(work, lock)

    def _execute(self, work: Work, lock: FileLock) -> dict[str, Any]:
        folder, command, made = self.root / work.folder, work.command(self.root), made_from(work, self.root)
        write_text(folder / "config.yaml", yaml.safe_dump({"verb": work.verb, "options": command[1:]}, width=120))
        if not (folder / BEGUN).exists():  # an interrupted training goes on from what it was begun from
            write_text(folder / BEGUN, json.dumps(made) + "\n")
        start = time.monotonic()
        with open(folder / LOG, "a", encoding="utf-8") as log:
            print(f"$ {shown(command)}", file=log, flush=True)
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
            done["made"] = made | {"codes": code_hashes(work, self.root)}
            write_text(folder / DONE, json.dumps(done) + "\n")
            self.tried[work.hash] = "done"
            print(f"  {work.stage}  {seconds:.0f} s: {folder}", flush=True)
        if stopped:
            print(f"  {work.stage}  {signal.Signals(stopped).name}: stopped; start again to go on", flush=True)
            sys.exit(128 + stopped)
        return _state(done)


def _state(done: dict[str, Any]) -> dict[str, Any]:
    return {"status": "done", "seconds": done["seconds"], "code": done.get("made", {}).get("code")}


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
    write_text(folder / METRICS, json.dumps(told, indent=2) + "\n")
