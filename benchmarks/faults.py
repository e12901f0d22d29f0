"""What happens to a training run when something breaks: kills, signals, full disks, NaN, and a rank that dies.

Every fault is real: SIGKILL in processes of their own, file systems that are full, ranks of Lightning and of torchrun.
Losses and weights are compared bit by bit with those of a run that nothing happened to. Needs Linux, and root for the
small file systems; without root these rows are skipped.

    python benchmarks/faults.py [--kills 20] [--only SIGTERM disk] [--output benchmarks/results/faults.json]

Each row is in the file as soon as it is finished. With --only, the other faults' rows in the file stay.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning

from benchmarks.fault_callbacks import POINTS, Disk
from benchmarks.fault_runs import LIMIT, SAVE_EVERY, VALIDATE_EVERY, Run, accident, context, lines
from benchmarks.machine import RESULTS, options, record

RANKS_LIMIT = 60  # seconds that a rank may outlive another


class Bench:
    """The folder of all runs, and the unbroken ones."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps = root, steps
        self.whole: dict[str, Run] = {}
        self.count = 0

    def run(self, model: str, disk: Path | None = None, **trainer) -> Run:
        """A new one, its checkpoints on another disk perhaps."""
        self.count += 1
        home = self.root / f"run{self.count:02d}"
        return Run(model, home, disk / "run" if disk else home, **{"steps": self.steps} | trainer)

    def unbroken(self, model: str) -> Run:
        """The run that nothing happens to, made at the first call."""
        if model not in self.whole:
            self.whole[model] = self.run(model)
            self.whole[model].live()
        return self.whole[model]


def outcomes(bench: Bench | None, faults: dict[str, tuple], kills: int) -> Iterator[dict]:
    """A row for each fault: whether the run survived it, and how."""
    for fault, (test, *case) in faults.items():
        load, begin = round(os.getloadavg()[0], 1), time.perf_counter()
        try:
            outcome, passed = test(bench, *case), True
        except Exception as error:  # a broken run can break its inspection anywhere, and the other rows go on
            outcome, passed = f"FAILED: {error!r}", False
        row = {"fault": fault, "times": kills if test is killed else 1, "outcome": outcome, "passed": passed}
        yield row | {"seconds": round(time.perf_counter() - begin, 1), "load": load}


# ---- one process


def killed(bench: Bench, model: str, times: int) -> str:
    """SIGKILL again and again, at all points in turn."""
    run, generator, points = bench.run(model), random.Random(model), (*POINTS, "any time")
    batches = [line[0] for line in lines(bench.unbroken(model).diaries[0])]
    for life in range(times):
        saved, point = run.step(), points[life % len(points)]
        if point == "any time":  # the parent kills it
            process, until = run.start(), time.monotonic() + LIMIT
            while len(lines(run.diaries[-1])) < generator.randint(1, 4) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.05))
            process.kill()
            run.end(process, -9)
        else:
            step = min(saved + generator.randint(1, 4), bench.steps - 1)
            run.live(accident("SignalAt", point=point, step=step), -9)
        if seen := lines(run.diaries[-1]):  # two batches a step; an epoch's remainder is left out
            first = next(batch for batch in batches if batch // 2 >= saved)
            assert seen[0][0] == first, f"life {life} began with batch {seen[0][0]}, not {first}"
    run.live()
    run.check_same(bench.unbroken(model))
    kinds = min(times, len(points))
    return f"{kinds} kinds of points; every life went on at the last complete checkpoint; bits of the unbroken run"


def stopped(bench: Bench, model: str, name: str, point: str, code: int) -> str:
    """A signal, and the same command again."""
    run = bench.run(model)
    run.live(accident("SignalAt", point=point, step=7, name=name), code)
    saved = run.step()
    assert 7 <= saved <= 8, f"step {saved} is saved"
    run.live()
    run.check_same(bench.unbroken(model))
    return f"exit code {code}, step {saved} saved; resumed to the bits of the unbroken run"


def truncated(bench: Bench) -> str:
    """A file system loses the second half of last.ckpt."""
    run = bench.run("ar")
    run.live(accident("SignalAt", point="backward", step=SAVE_EVERY), -9)
    os.truncate(run.checkpoint, run.checkpoint.stat().st_size // 2)
    said = run.live(code=2).splitlines()[-1]
    assert f"cannot read {run.checkpoint}" in said, said
    assert not lines(run.diaries[-1])
    return "refused with its name, exit code 2"


def poisoned(bench: Bench) -> str:
    """One bad step, then three in a row."""
    run = bench.run("tokenizer")
    run.live(accident("Poison", batches=[4]))
    assert (run.step(), run.skipped()) == (bench.steps, 1)
    run = bench.run("tokenizer")
    said = run.live(accident("Poison", batches=[13, 15, 17, 19]), 2)  # steps 7, 8, 9 and 10: the third ends it
    assert "in 3 steps in a row" in said, said
    run.skipped()
    return "1 step skipped and counted, the run went on; 3 in a row: exit code 2 and a line; weights, EMA, AdamW finite"


# ---- disks


@contextmanager
def small_disk(folder: Path):
    """A file system of its own, of 4 MB."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "faults", folder], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def may_mount() -> bool:
    """Whether small file systems can be had."""
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def broken_disk(bench: Bench, how: str, mended: int) -> str:
    """The disk with checkpoints and logs breaks after 4 steps."""
    with small_disk(bench.root / f"{how}{mended}") as disk:
        run = bench.run("ar", disk)
        said = run.live(accident("Disk", folder=disk, how=how, breaks=4, mended=mended), 0 if mended else 2)
        told = [line for line in said.splitlines() if "cannot write" in line]
        assert any("last.ckpt" in line for line in told), said[-600:]
        if mended:
            run.check_same(bench.unbroken("ar"))
            return f"{len(told)} lines said so; the run went on and wrote the next checkpoint; exit code 0, same bits"
        saved, expected = run.step(), max(4 // every * every for every in (SAVE_EVERY, VALIDATE_EVERY))
        assert saved == expected, f"step {saved} saved, not {expected}"
        Disk(disk, how, 0).set(broken=False)
        run.live()
        run.check_same(bench.unbroken("ar"))
        return f"{len(told)} lines said so, exit code 2 at the end, step {saved} intact; resumed to the same bits"


def read_only_start(bench: Bench) -> str:
    """Nothing is trained that could not be saved."""
    with small_disk(bench.root / "start") as disk:
        Disk(disk, "read_only", 0).set(broken=True)
        run = bench.run("ar", disk)
        said = run.live(code=2).splitlines()[-1]
    assert "Read-only file system" in said, said
    assert not lines(run.diaries[-1])
    return f"exit code 2 before the first step: {said.replace(str(bench.root), '')}"


def full_temp(bench: Bench) -> str:
    """The temporary folder has no room."""
    run = bench.run("ar")
    with small_disk(bench.root / "temp") as temp:
        Disk(temp, "full", 0).set(broken=True)
        run.live(temp=temp)
    run.check_same(bench.unbroken("ar"))
    return "is not used: same bits"


# ---- two ranks


def signalled_rank(bench: Bench, launcher: str, rank: int, name: str) -> str:
    """A signal for one of two ranks."""
    run = bench.run("ar", steps=12, devices=2, strategy="ddp")
    words = accident("SignalAt", point="backward", step=4, name=name, rank=rank)
    code, seconds = run.two_ranks(launcher, words, rank)
    if name == "SIGKILL":
        assert code != 0, f"exit code 0: {run.said()[-600:]}"
        assert seconds < RANKS_LIMIT, f"the last process ended after {seconds:.0f} seconds"
        assert run.step() == 4, f"step {run.step()} is saved"  # before the validation after batch 8
        return f"exit code {code}; no process was left after {seconds:.0f} s (limit {RANKS_LIMIT})"
    assert (code, run.step()) == (143, 5), f"exit code {code}, step {run.step()} is saved: {run.said()[-600:]}"
    return f"both stopped after the same step and saved it; exit code 143, no process left after {seconds:.0f} s"


def poisoned_rank(bench: Bench) -> str:
    """NaN that only rank 1 can see."""
    run = bench.run("ar", steps=12, devices=2, strategy="ddp")
    code, _ = run.two_ranks("lightning", accident("Poison", batches=[4], rank=1), 0)
    assert (code, run.skipped()) == (0, 1), run.said()[-600:]
    return "rank 0 skipped the step too: 1 counted there, weights, EMA and AdamW finite"


FAULTS = {
    "SIGTERM in backward, tokenizer": (stopped, "tokenizer", "SIGTERM", "backward", 143),
    "SIGTERM in backward, ar": (stopped, "ar", "SIGTERM", "backward", 143),
    "SIGTERM in validation, tokenizer": (stopped, "tokenizer", "SIGTERM", "validation", 143),
    "SIGINT in step, ar": (stopped, "ar", "SIGINT", "step", 130),
    "last.ckpt cut by the file system": (truncated,),
    "NaN in one step, and in three in a row": (poisoned,),
    "disk full, mended later": (broken_disk, "full", 10),
    "disk read_only, mended later": (broken_disk, "read_only", 10),
    "disk full until the end": (broken_disk, "full", 0),
    "folder read-only at the start": (read_only_start,),
    "temporary folder full": (full_temp,),
    "NaN on rank 1 of 2": (poisoned_rank,),
    "kill -9 of rank 0 of 2, lightning": (signalled_rank, "lightning", 0, "SIGKILL"),
    "kill -9 of rank 1 of 2, lightning": (signalled_rank, "lightning", 1, "SIGKILL"),
    "kill -9 of rank 1 of 2, torchrun": (signalled_rank, "torchrun", 1, "SIGKILL"),
    "SIGTERM to rank 0 of 2, lightning": (signalled_rank, "lightning", 0, "SIGTERM"),
    "SIGTERM to rank 1 of 2, lightning": (signalled_rank, "lightning", 1, "SIGTERM"),
}
ON_DISKS = (broken_disk, read_only_start, full_temp)


if __name__ == "__main__":  # exits with status 1 if a fault was not survived
    context.set_forkserver_preload(
        ["benchmarks.fault_callbacks", "benchmarks.fault_runs", "dar_lightning.commands.fit"]
    )
    given = options(__doc__, kills=20, only=[""], output=RESULTS / "faults.json")
    steps = max(20, 2 * given.kills + 10)  # a kill goes at least one step further than the one before
    faults = {f"kill -9, {model}": (killed, model, given.kills) for model in ("tokenizer", "ar")} | FAULTS
    if not may_mount():
        print("disks that are full or read-only: skipped, mounting needs root")
        faults = {fault: test for fault, test in faults.items() if test[0] not in ON_DISKS}
    chosen = {fault: test for fault, test in faults.items() if any(word in fault for word in given.only)}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        rows = outcomes(Bench(Path(folder), steps), chosen, given.kills)
        what = "faults in training runs of the smallest models, and what became of the runs"
        rows = record(given.output, what, rows, key="fault", lightning=lightning.__version__)
    sys.exit(0 if all(row["passed"] for row in rows if row["fault"] in chosen) else 1)
