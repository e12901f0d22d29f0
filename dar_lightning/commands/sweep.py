"""`dar sweep`: an ablation's grid, cell by cell, by the verbs that single runs use."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from filelock import FileLock, Timeout

from dar_lightning.commands.quickstart import last_scalars
from dar_lightning.errors import UserError
from dar_lightning.files import read_json, users_path, write_text
from dar_lightning.generation.grids import mosaic, save_png
from dar_lightning.metrics.images import NpzImages
from dar_lightning.records.provenance import read_code
from dar_lightning.sweeps.child import call
from dar_lightning.sweeps.finished import (
    BEGUN,
    DONE,
    LOCK,
    code_hashes,
    is_of_others,
    is_outdated,
    made_from,
    put_aside,
    read_done,
)
from dar_lightning.sweeps.plan import Cell, Stage, Sweep, Work, shown

METRICS, SAMPLES = "metrics.json", "samples.png"
PROGRAM = [sys.executable, "-m", "dar_lightning"]
LOG = "log.txt"
SCALARS = ("val/", "groups/val_", "written/val_")  # what metrics.json takes from a training's logs
REPORTS = {"evaluate": "evaluation.json", "reconstruct": "reconstruction.json"}
PICTURES = {"sample": "samples.png", "reconstruct": "reconstructions.png"}
TABLE_IMAGES = 64  # of its first row and seed, for samples.png where no stage makes a picture

SCRIPT = """#!/usr/bin/env bash
# One task per cell and seed. What several cells need is made by one of them; the others wait for it.
# Run: sbatch --gpus-per-node=8 --cpus-per-task=96 --time=24:00:00 {path}
# Five minutes before the time limit a training saves and ends.
# Again after a time limit or a failure: what is done is not done again.
#SBATCH --job-name=dar-{name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@300
#SBATCH --chdir={cwd}
#SBATCH --output={log}
unset SLURM_NTASKS SLURM_JOB_NAME # Lightning then starts one process per GPU itself
exec {python} -m dar_lightning sweep {file} --output {root} --redo {redo} --only "[$SLURM_ARRAY_TASK_ID]"
"""


def sweep(
    name: str,
    stages: dict[str, Stage],
    grid: dict[str, list | dict],
    title: str = "",
    budget: str = "",
    seeds: list[int] = [0],  # noqa: B006  (jsonargparse shows it)
    x_axis: str | None = None,
    figures: list[str] = [],  # noqa: B006
    paper: list[dict[str, Any]] = [],  # noqa: B006
    output: str | None = None,
    only: list[int] | None = None,
    dry_run: bool = False,
    slurm: bool = False,
    redo: Literal["none", "changed"] = "none",
) -> None:
    """Run the stages of every cell of a grid, with every seed.

    A stage whose command, config files and earlier stages are the same in several cells is done once. What is done is
    not done again; what has changed since is, in a new folder, and a line says so. Another line names the cells that
    other code of this package or other data made. A stage that fails ends its cell, not the sweep: the exit code is
    then 1. An interrupted training goes on from its last checkpoint. SIGTERM, SIGUSR1 and Ctrl+C are passed on to the
    running command, which ends first, a training with a checkpoint.

    Writes `sweep.json`, `shared/STAGE-HASH/` (results, `log.txt`, `config.yaml`) and, for every cell and seed,
    `cells/CELL/seedS/` with `cell.json` (stages, commands, state), `metrics.json` and `samples.png`.

    Args:
        name: of the sweep.
        stages: by name and in order, the commands of every cell: verb, config files and options. See sweep.Stage.
        grid: axis -> its values: a list, or {name: {placeholder: value, ...}} where a value stands for several options;
            with one such axis, the grid is a list of overrides. Cells are all combinations.
        title: for the report.
        budget: for the report, what each cell is given, in words.
        seeds: every cell is run with each. Stages without {seed} are the same for all.
        x_axis: the axis that plots have below; the first one when left out.
        figures: names in metrics.json that the report shows.
        paper: the paper's figures: {axis: value, ..., figure: number}, for the cells with these values.
        output: folder to write to; runs/sweeps/NAME when left out.
        only: run these cells alone, by number from 0, in the order of --dry_run.
        dry_run: print the commands, and run nothing.
        slurm: write a SLURM script, an array with a task per cell and seed, and run nothing.
        redo: of what is done, "none" is made anew, or what is "changed": made by other code or from other shards than
            there are now. What it was goes to `replaced/`. Whatever needs a stage that was made anew, is so too.
    """
    plan = Sweep(name, stages, grid, title, budget, seeds, x_axis, figures, paper)
    root = Path(output or f"runs/sweeps/{name}")
    runs = list(plan.runs())
    chosen = list(range(len(runs))) if only is None else only
    if not set(chosen) <= set(range(len(runs))):
        raise UserError(f"only is {only}: this sweep has cells 0 to {len(runs) - 1}")
    for cell, seed in runs:  # a mistake in any cell is found before the first one begins
        plan.work(cell, seed)
    code = read_code()["sha256"]
    others = [
        runs[number]
        for number in chosen
        if any(is_of_others(work, root, code) for work in plan.work(*runs[number]).values())
    ]
    if others and not dry_run:
        names = "all" if len(others) == len(chosen) else ", ".join(f"{cell.name} seed {seed}" for cell, seed in others)
        how = "they are made anew" if redo == "changed" else "--redo changed makes them anew"
        print(f"other code or data made {len(others)} of {len(chosen)} cells, {how}: {names}", flush=True)
    wanted = code if redo == "changed" else None
    if dry_run:
        _print_commands(plan, root, chosen, wanted)
        return
    _prepare(plan, root, wanted)
    if slurm:
        path = root / "sweep.sbatch"
        whole = root.resolve()
        places = {"path": whole / path.name, "cwd": Path.cwd(), "log": whole / "slurm-%A_%a.log", "root": whole}
        places |= {"file": whole / "sweep.yaml", "python": sys.executable}
        quoted = {key: shlex.quote(str(place)) for key, place in places.items()}
        write_text(path, SCRIPT.format(name=name, last=len(runs) - 1, redo=redo, **quoted))
        print(f"{path}: an array of {len(runs)} tasks; sbatch {shlex.quote(str(path))}")
        return
    tried: dict[str, str] = {}  # hash -> done or failed; a cell with the same work does not try again
    states = []
    for turn, number in enumerate(chosen, start=1):
        cell, seed = runs[number]
        print(f"[{turn}/{len(chosen)}] {cell.name} seed {seed}", flush=True)
        states.append(_run_cell(plan, cell, seed, root, wanted, tried))
    _print_states([runs[number] for number in chosen], states)
    if any(state["status"] == "failed" for state in states):
        sys.exit(1)


def _print_commands(plan: Sweep, root: Path, chosen: list[int], wanted: str | None) -> None:
    seen: set[str] = set()
    for number, (cell, seed) in enumerate(plan.runs()):
        if number not in chosen:
            continue
        print(f"# {number}: {cell.name} seed {seed}")
        for work in plan.work(cell, seed).values():
            if work.hash in seen:
                print(f"# {work.stage}: as above, {work.folder}")
            else:
                done = read_done(work, root) is not None and not is_outdated(work, root, wanted)
                print(shown(work.command(root)) + ("  # done" if done else ""))
            seen.add(work.hash)


def _prepare(plan: Sweep, root: Path, wanted: str | None = None) -> None:
    """Make the folder, or go on in one of the same sweep; a cell that is not what the plan says is pending again."""
    mark = root / "sweep.json"  # it comes first, so that another process finds nothing else without it
    with users_path("output"):
        root.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") for path in root.iterdir()) and not mark.exists():
        raise UserError(f"output: {root} holds other files, give a new folder")
    with FileLock(root / LOCK):
        if mark.exists() and read_json(mark).get("name") != plan.name:
            raise UserError(f"output: {root} is of the sweep {read_json(mark).get('name')}, give another folder")
        write_text(mark, json.dumps(plan.summary(), indent=2) + "\n")
        settings = {key: value for key, value in vars(plan).items() if key != "stages"}
        settings["stages"] = {name: vars(stage) for name, stage in plan.stages.items()}
        write_text(root / "sweep.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120))
        for cell, seed in plan.runs():
            _prepare_cell(plan, cell, seed, root, wanted)


def _prepare_cell(plan: Sweep, cell: Cell, seed: int, root: Path, wanted: str | None) -> None:
    folder, works = _folder(root, cell, seed), plan.work(cell, seed)
    if (folder / "cell.json").exists():
        before = {stage["name"]: stage for stage in read_json(folder / "cell.json")["stages"]}
        same = {name: stage["hash"] for name, stage in before.items()} == {name: w.hash for name, w in works.items()}
        if same and not any(is_outdated(work, root, wanted) for work in works.values()):
            return
        for name, work in works.items():
            old = before.get(name)
            if old is not None and old["status"] == "done" and old["hash"] != work.hash:
                told = f"  {name} has changed since it was done in {old['folder']}: it is to be done again"
                print(f"{told} ({cell.name} seed {seed})", flush=True)
                break
    for result in (METRICS, SAMPLES):  # figures of another config would mislead
        (folder / result).unlink(missing_ok=True)
    _record(plan, root, cell, seed, {})


def _folder(root: Path, cell: Cell, seed: int) -> Path:
    return root / "cells" / cell.name / f"seed{seed}"


def _record(plan: Sweep, root: Path, cell: Cell, seed: int, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write cell.json; `done` is state and seconds of stages by name, others are pending."""
    stages = [
        {"name": name, "folder": work.folder, "command": ["dar", *work.command(root)], "hash": work.hash}
        | done.get(name, {"status": "pending", "seconds": None})
        for name, work in plan.work(cell, seed).items()
    ]
    found = {stage["status"] for stage in stages}
    status = "failed" if "failed" in found else "pending" if "pending" in found else "done"
    state = {"cell": cell.name, "seed": seed, "values": cell.values, "status": status, "stages": stages}
    write_text(_folder(root, cell, seed) / "cell.json", json.dumps(state, indent=2) + "\n")
    return state


def _run_cell(
    plan: Sweep, cell: Cell, seed: int, root: Path, wanted: str | None, tried: dict[str, str]
) -> dict[str, Any]:
    works, folder = plan.work(cell, seed), _folder(root, cell, seed)
    done: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        done[name] = _run_work(work, root, wanted, tried)
        state = _record(plan, root, cell, seed, done)
        if done[name]["status"] == "failed":
            return state
    _collect(list(works.values()), root, folder)
    return state


def _run_work(work: Work, root: Path, wanted: str | None, tried: dict[str, str]) -> dict[str, Any]:
    """Do a stage, unless it is done; other processes that need the same wait."""
    folder = root / work.folder
    if tried.get(work.hash) == "failed":
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
        done, again = read_done(work, root), work.hash not in tried and is_outdated(work, root, wanted)
        if done is not None and not again:
            print(f"  {work.stage}  done already: {folder}", flush=True)
            return _state(done)
        if again:
            print(f"  {work.stage}  is made anew; what it was: {put_aside(work, root)}", flush=True)
        return _execute(work, root, tried, lock)


def _state(done: dict[str, Any]) -> dict[str, Any]:
    return {"status": "done", "seconds": done["seconds"], "code": done.get("made", {}).get("code")}


def _execute(work: Work, root: Path, tried: dict[str, str], lock: FileLock) -> dict[str, Any]:
    folder, command, made = root / work.folder, work.command(root), made_from(work, root)
    write_text(folder / "config.yaml", yaml.safe_dump({"verb": work.verb, "options": command[1:]}, width=120))
    if not (folder / BEGUN).exists():  # an interrupted training goes on from what it was begun from
        write_text(folder / BEGUN, json.dumps(made) + "\n")
    start = time.monotonic()
    with open(folder / LOG, "a", encoding="utf-8") as log:
        print(f"$ {shown(command)}", file=log, flush=True)
        status, stopped = _call([*PROGRAM, *command], log, lock)
    seconds = round(time.monotonic() - start, 1)
    if status and not stopped:
        tried[work.hash] = "failed"
        last = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        print(f"  {work.stage}  failed with status {status}: {last} ({folder / LOG})", flush=True)
        return {"status": "failed", "seconds": seconds}
    if not status:
        if (resolved := folder / "tensorboard/config.yaml").exists():  # Lightning's, every value that it used
            shutil.copyfile(resolved, folder / "config.yaml")
        done = {"hash": work.hash, "command": command, "seconds": seconds}
        done["made"] = made | {"codes": code_hashes(work, root)}
        write_text(folder / DONE, json.dumps(done) + "\n")
        tried[work.hash] = "done"
        print(f"  {work.stage}  {seconds:.0f} s: {folder}", flush=True)
    if stopped:
        print(f"  {work.stage}  {signal.Signals(stopped).name}: stopped; start again to go on", flush=True)
        sys.exit(128 + stopped)
    return _state(done)


def _call(words: list[str], log: IO[str], lock: FileLock) -> tuple[int, int]:
    """Run a command to its end; its exit status, and the signal that asked this process to stop meanwhile, or 0.

    The command also holds the lock: should this process be killed, another one that needs the folder waits for it.
    """
    return call(words, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock._context.lock_file_fd])


def _collect(works: list[Work], root: Path, folder: Path) -> None:
    """metrics.json and samples.png of a cell whose stages are done; later stages take the place of earlier ones."""
    figures: dict[str, float | None] = {}
    stages: dict[str, str] = {}  # that the figures are of
    protocol: dict[str, Any] = {}
    for work in works:
        place, found = root / work.folder, {}
        if work.verb == "fit":
            found = last_scalars(place / "tensorboard", SCALARS)
            for path in sorted(place.glob("evaluation/*.json")):  # NAME-STEP, by the FID callbacks; the last step stays
                protocol[f"{work.stage}, val/{path.stem.rpartition('-')[0]}"] = read_json(path)["protocol"]
        elif work.verb in REPORTS:
            report = read_json(place / REPORTS[work.verb])
            found = report["metrics"]
            protocol[work.stage] = report["protocol"]
        elif work.verb == "table":
            row = read_json(place / "table.json")["rows"][0]
            prefix = "r" if "--task=reconstruct" in work.words else "g"  # rFID and gFID may both be of one cell
            found = {
                f"{prefix}{name}" if name.startswith("F") else name: metric["mean"]
                for name, metric in row["metrics"].items()
            }
            protocol[work.stage] = row["protocol"]
            drawn = place / f"row0/seed{row['seeds'][0]}/samples.npz"
            if drawn.is_file() and not any(other.verb in PICTURES for other in works):
                save_png(mosaic(next(NpzImages(drawn, work.stage).batches(TABLE_IMAGES))[0]), folder / SAMPLES)
        figures |= found
        stages |= dict.fromkeys(found, work.stage)
        if work.verb in PICTURES:
            shutil.copyfile(place / PICTURES[work.verb], folder / SAMPLES)
    told = {"figures": figures, "stages": stages, "protocol": protocol}
    write_text(folder / METRICS, json.dumps(told, indent=2) + "\n")


def _print_states(runs: list[tuple[Cell, int]], states: list[dict[str, Any]]) -> None:
    width = max(len(cell.name) for cell, _ in runs)
    print(f"\n{'cell':<{width}}  seed  state   minutes")
    for (cell, seed), state in zip(runs, states, strict=True):
        minutes = sum(stage["seconds"] or 0 for stage in state["stages"]) / 60
        failed = next((f"  {stage['name']}" for stage in state["stages"] if stage["status"] == "failed"), "")
        print(f"{cell.name:<{width}}  {seed:<4}  {state['status']:<6}  {minutes:.1f}{failed}")
