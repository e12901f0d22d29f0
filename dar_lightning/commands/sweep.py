"""`dar sweep`: run an ablation grid, cell by cell, with the verbs of single runs."""

import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from dar_lightning.errors import begin_work, require
from dar_lightning.files import write_text
from dar_lightning.records.provenance import read_code
from dar_lightning.sweeps.plan import Stage, Sweep
from dar_lightning.sweeps.run import Runner, is_of_others, is_outdated, read_done

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
#SBATCH --open-mode=append
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
        figures: metrics of metrics.json that the report shows.
        paper: the paper's metrics: {axis: value, ..., metric: number}, for the cells with these values.
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
    labels = [f"{cell.name} seed {seed}" for cell, seed in runs]
    require({*(only or ())} <= {*range(len(runs))}, f"only is {only}: this sweep has cells 0 to {len(runs) - 1}")
    works = [plan.work(*run) for run in runs]  # a mistake in any cell is found before the first one begins
    chosen = list(range(len(runs))) if only is None else only
    code = read_code()["sha256"]
    wanted = code if redo == "changed" else None
    if dry_run:
        seen: set[str] = set()
        for number in sorted({*chosen}):
            print(f"# {number}: {labels[number]}")
            for work in works[number].values():
                done = read_done(work, root) is not None and not is_outdated(work, root, wanted)
                command = shlex.join(["dar", *work.command(root)]) + ("  # done" if done else "")
                print(f"# {work.stage}: as above, {work.folder}" if work.hash in seen else command)
                seen.add(work.hash)
        return
    if others := [labels[i] for i in chosen if any(is_of_others(work, root, code) for work in works[i].values())]:
        names = "all" if len(others) == len(chosen) else ", ".join(others)
        how = "they are made anew" if redo == "changed" else "--redo changed makes them anew"
        print(f"other code or data made {len(others)} of {len(chosen)} cells, {how}: {names}", flush=True)
    begin_work()
    runner = Runner(plan, root, wanted)
    runner.prepare()
    if slurm:
        path, whole = root / "sweep.sbatch", root.resolve()
        places = {"path": whole / path.name, "cwd": Path.cwd(), "log": whole / "slurm-%A_%a.log", "root": whole}
        places |= {"file": whole / "sweep.yaml", "python": sys.executable}
        quoted = {key: shlex.quote(str(place)) for key, place in places.items()}
        write_text(path, SCRIPT.format(name=name, last=len(runs) - 1, redo=redo, **quoted))
        print(f"{path}: an array of {len(runs)} tasks; sbatch {shlex.quote(str(path))}")
        return
    states = []
    for turn, number in enumerate(chosen, start=1):
        print(f"[{turn}/{len(chosen)}] {labels[number]}", flush=True)
        states.append(runner.run(*runs[number]))
    width = max(len(state["cell"]) for state in states)
    print(f"\n{'cell':<{width}}  seed  state   minutes")
    for state in states:
        minutes = sum(stage["seconds"] or 0 for stage in state["stages"]) / 60
        failed = next((f"  {stage['name']}" for stage in state["stages"] if stage["status"] == "failed"), "")
        print(f"{state['cell']:<{width}}  {state['seed']:<4}  {state['status']:<6}  {minutes:.1f}{failed}")
    if any(state["status"] == "failed" for state in states):
        sys.exit(1)
