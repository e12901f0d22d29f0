"""What happens to a training run when something breaks: kills, signals, full disks, NaN, and a rank that dies.

Every fault is real: SIGKILL in processes of their own, file systems that are full, ranks of Lightning and of torchrun.
Runs train the smallest tokenizer and AR model on a CPU, with EMA, validation and gradient accumulation, so that losses
and weights can be compared bit by bit with those of a run that nothing happened to. Needs Linux, and root for the small
file systems; without root these rows are skipped.

    python benchmarks/faults.py [--kills 20] [--only SIGTERM disk] [--output benchmarks/results/faults.json]

Each row is in the file as soon as it is finished. With --only, the other faults' rows in the file stay.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch
from fault_callbacks import Disk
from fault_runs import (
    LIMIT,
    SAVE_EVERY,
    VALIDATE_EVERY,
    WHAT,
    callback,
    command,
    differences,
    finish,
    last,
    lines,
    start,
    write_data,
)

from dar_lightning.files import write_text

RANKS_LIMIT = 60  # seconds that a rank may outlive another


class Bench:
    """Folders, the unbroken runs, and the table."""

    def __init__(self, root: Path, steps: int, only: list[str], output: Path) -> None:
        self.root, self.steps, self.only, self.output = root, steps, only, output
        self.rows: list[dict] = []
        self.before = json.loads(output.read_text())["rows"] if output.exists() else []
        write_data(root / "data")
        self.whole: dict[str, Path] = {}

    def unbroken(self, model: str) -> Path:
        """Folder of the run that nothing happens to, made at the first call."""
        if model not in self.whole:
            run = self.whole[model] = self.root / "whole" / model
            run.mkdir(parents=True)
            code = finish(start(self.command(model, run), run / "diary"))
            assert code == 0, (run / "diary.log").read_text()[-2000:]
        return self.whole[model]

    def command(self, model: str, run: Path, **options) -> list[str]:
        """The same command for the same run."""
        workers = 1 if model == "tokenizer" else 0
        return command(model, self.root / "data", run, self.steps, workers, **options)

    def folder(self, name: str) -> Path:
        """A new one."""
        path = self.root / name.replace(" ", "_").replace(",", "")
        path.mkdir(parents=True)
        return path

    def same(self, model: str, run: Path, diaries: list[Path]) -> None:
        """The run ended with the bits of the unbroken one; all lives saw its batches, together all of them."""
        whole = {line[0]: line for line in lines(self.unbroken(model) / "diary")}
        seen = [line for diary in diaries for line in lines(diary)]
        wrong = [line[0] for line in seen if line != whole[line[0]]]
        assert not wrong, f"other losses or samples in batches {wrong}"
        assert {line[0] for line in seen} == set(whole), "batches are missing"
        end, expected = last(run), last(self.unbroken(model))
        assert end["global_step"] == self.steps
        assert not (places := [place for key in WHAT for place in differences(expected[key], end[key], key)]), places
        names = [path.name for path in (run / "checkpoints").iterdir()]
        assert names == ["last.ckpt"], f"left behind: {names}"

    def row(self, fault: str, times: int, test: Callable[[], str]) -> None:
        """Run one fault, if it was asked for, and add its row."""
        if not any(word in fault for word in self.only):
            return
        load = round(os.getloadavg()[0], 1)  # of the machine when this begins
        begin = time.perf_counter()
        try:
            outcome, passed = test(), True
        except Exception as error:  # a broken run can break its inspection anywhere, and the other rows go on
            outcome, passed = f"FAILED: {error!r}", False
        seconds = round(time.perf_counter() - begin, 1)
        row = {"fault": fault, "times": times, "outcome": outcome, "passed": passed, "seconds": seconds, "load": load}
        self.rows.append(row)
        print(f"{'ok' if passed else 'FAILED':6} {fault:52} x{times:<3} {seconds:6.1f} s  {outcome}", flush=True)
        self.save()

    def save(self) -> None:
        """Write the rows, and of those from before what was not done again."""
        done = {row["fault"] for row in self.rows}
        result = {
            "what": "faults in training runs of the smallest models, and what became of the runs",
            "processor": processor(),
            "platform": platform.platform(terse=True),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "rows": [*(row for row in self.before if row["fault"] not in done), *self.rows],
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.output, json.dumps(result, indent=2) + "\n")


POINTS = (
    "half_written",
    "validation",
    "epoch_end",
    "backward",
    "renaming",
    "step",
    "written",
    "epoch_start",
    "renamed",
)


def kills(bench: Bench, model: str, times: int) -> str:
    """SIGKILL again and again: at the points above in turn, and at times that the parent draws."""
    run, generator, diaries, saved, points = bench.folder(f"kills {model}"), random.Random(model), [], 0, []
    bench.unbroken(model)
    for life in range(times):
        diaries.append(run / f"diary{life}")
        point = (*POINTS, "any time")[life % (len(POINTS) + 1)]
        if point == "any time":
            process = start(bench.command(model, run), diaries[-1])
            until = time.monotonic() + LIMIT
            while len(lines(diaries[-1])) < generator.randint(1, 4) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.05))
            process.kill()
        else:
            step = min(saved + generator.randint(1, 4), bench.steps - 1)
            accident = callback("fault_callbacks.SignalAt", point=point, step=step)
            process = start(bench.command(model, run), diaries[-1], accident)
        code = finish(process)
        assert code == -9, f"{point}: exit code {code}: {log_end(diaries[-1])}"
        points.append(point)
        if before := [line[0] for line in lines(diaries[-1])]:
            first = next(line[0] for line in lines(bench.unbroken(model) / "diary") if _step(line[0]) >= saved)
            assert before[0] == first, f"life {life} began with batch {before[0]}, not {first}"
        saved = last(run)["global_step"] if (run / "checkpoints/last.ckpt").exists() else 0
    diaries.append(run / "diary_end")
    code = finish(start(bench.command(model, run), diaries[-1]))
    assert code == 0, f"exit code {code}: {log_end(diaries[-1])}"
    bench.same(model, run, diaries)
    kinds = len(set(points))
    return f"{kinds} kinds of points; every life went on at the last complete checkpoint; bits of the unbroken run"


def _step(batch: int) -> int:
    """Optimizer steps done before a batch: two batches each, since an epoch's remainder is left out."""
    return batch // 2


def log_end(diary: Path) -> str:
    """What a run said last, in one line."""
    return " ".join(Path(f"{diary}.log").read_text()[-600:].split())


def stopped(bench: Bench, model: str, name: str, point: str, step: int, expected: int) -> str:
    """A signal, and the same command again."""
    run = bench.folder(f"{name} {point} {model}")
    diaries = [run / "diary0", run / "diary1"]
    accident = callback("fault_callbacks.SignalAt", point=point, step=step, name=name)
    code = finish(start(bench.command(model, run), diaries[0], accident))
    assert code == expected, f"exit code {code}: {log_end(diaries[0])}"
    saved = last(run)["global_step"]
    assert step <= saved <= step + 1, f"step {saved} is saved"
    code = finish(start(bench.command(model, run), diaries[1]))
    assert code == 0, f"exit code {code}: {log_end(diaries[1])}"
    bench.same(model, run, diaries)
    return f"exit code {expected}, step {saved} saved; resumed to the bits of the unbroken run"


@contextmanager
def small_disk(folder: Path, size: str = "4m"):
    """A file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def broken_disk(bench: Bench, model: str, how: str, breaks: int, mended: int) -> str:
    """The disk with checkpoints and logs breaks in the middle of a run."""
    home = bench.folder(f"disk {how} {mended}")
    with small_disk(home / "disk") as disk:
        run, diaries = disk / "run", [home / "diary0", home / "diary1"]
        accident = callback("fault_callbacks.Disk", folder=disk, how=how, breaks=breaks, mended=mended)
        code = finish(start(bench.command(model, run), diaries[0], accident))
        said = [line for line in Path(f"{diaries[0]}.log").read_text().splitlines() if "cannot write" in line]
        assert any("last.ckpt" in line for line in said), log_end(diaries[0])
        if mended:
            assert code == 0, f"exit code {code}: {log_end(diaries[0])}"
            bench.same(model, run, diaries[:1])
            return f"{len(said)} lines said so; the run went on and wrote the next checkpoint; exit code 0, same bits"
        saved = last(run)["global_step"]
        expected = max(breaks // every * every for every in (SAVE_EVERY, VALIDATE_EVERY))
        assert (code, saved) == (2, expected), f"exit code {code}, step {saved} saved, not {expected}"
        Disk(disk, how, 0).set(broken=False)
        assert finish(start(bench.command(model, run), diaries[1])) == 0, log_end(diaries[1])
        bench.same(model, run, diaries)
        return f"{len(said)} lines said so, exit code 2 at the end, step {saved} intact; resumed to the same bits"


def read_only_start(bench: Bench, model: str) -> str:
    """Nothing is trained that could not be saved."""
    home = bench.folder("read-only start")
    with small_disk(home / "disk") as disk:
        Disk(disk, "read_only", 0).set(broken=True)
        code = finish(start(bench.command(model, disk / "run"), home / "diary"))
    assert code == 2, f"exit code {code}"
    said = Path(f"{home / 'diary'}.log").read_text().strip().splitlines()[-1]
    assert "Read-only file system" in said, said
    assert not lines(home / "diary")
    return f"exit code 2 before the first step: {said.replace(str(home), '')}"


def full_temp(bench: Bench, model: str) -> str:
    """The temporary folder has no room."""
    home = bench.folder("full temp")
    with small_disk(home / "temp") as temp:
        Disk(temp, "full", 0).set(broken=True)
        assert finish(start(bench.command(model, home / "run"), home / "diary", temp=str(temp))) == 0
    bench.same(model, home / "run", [home / "diary"])
    return "is not used: same bits"


def truncated(bench: Bench, model: str) -> str:
    """A file system loses the second half of last.ckpt."""
    run = bench.folder("truncated")
    accident = callback("fault_callbacks.SignalAt", point="backward", step=SAVE_EVERY)
    assert finish(start(bench.command(model, run), run / "diary0", accident)) == -9
    path = run / "checkpoints" / "last.ckpt"
    os.truncate(path, path.stat().st_size // 2)
    code = finish(start(bench.command(model, run), run / "diary1"))
    assert code == 2, f"exit code {code}"
    said = Path(f"{run / 'diary1'}.log").read_text().strip().splitlines()[-1]
    assert f"cannot read {path}" in said, said
    assert not lines(run / "diary1")
    return "refused with its name, exit code 2"


def poisoned(bench: Bench, model: str) -> str:
    """One bad step, then three in a row."""
    run = bench.folder("poisoned")
    bad = callback("fault_callbacks.Poison", batches=[4])
    assert finish(start(bench.command(model, run / "one"), run / "diary0", bad)) == 0, log_end(run / "diary0")
    end = last(run / "one")
    skipped = next(state for name, state in end["callbacks"].items() if "SkipBadSteps" in name)["counts"][0]
    assert (end["global_step"], int(skipped)) == (bench.steps, 1), f"{skipped} skipped"
    check_finite(end)
    bad = callback("fault_callbacks.Poison", batches=[13, 15, 17, 19])  # steps 7, 8, 9 and 10: the third ends it
    code = finish(start(bench.command(model, run / "three"), run / "diary1", bad))
    assert code == 2, f"exit code {code}: {log_end(run / 'diary1')}"
    assert "in 3 steps in a row" in log_end(run / "diary1"), log_end(run / "diary1")
    check_finite(last(run / "three"))
    return "1 step skipped and counted, the run went on; 3 in a row: exit code 2 and a line; weights, EMA, AdamW finite"


def check_finite(checkpoint: dict) -> None:
    """All tensors of the model, its average and the optimizer."""
    found = [checkpoint[key] for key in ("state_dict", "current_model_state", "optimizer_states")]
    while found:
        value = found.pop()
        if isinstance(value, torch.Tensor):
            assert bool(value.isfinite().all()), "not finite"
        elif isinstance(value, dict | list | tuple):
            found += value.values() if isinstance(value, dict) else value


def processes(run: Path) -> dict[int, list[str]]:
    """Those alive whose command line names the folder of a run: ranks, and their loaders' workers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if state != "Z" and any(str(run) in word for word in words):
            found[int(path.parent.name)] = words
    return found


def two_ranks(bench: Bench, how: str, launcher: str, accident: list[str], rank: int = 0) -> tuple[int, float, Path]:
    """Two real ranks with a worker each: exit code, seconds that anything lived on after the accident, folder."""
    run = bench.folder(f"{how} {launcher}")
    words = command("ar", bench.root / "data", run, 12, workers=1, devices=2, strategy="ddp")
    words += [*callback("fault_callbacks.Diary", path=run / "diary"), *accident]
    words += ["--data.init_args.batch_size=2"]
    module = ["-m", "dar_lightning"]
    if launcher == "torchrun":
        module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *module]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with open(run / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *module, *(str(word) for word in words)], stdout=log, stderr=log, env=environment
        )
    diary, silent = Path(f"{run / 'diary'}.{rank}"), time.monotonic()
    lived, size = None, -1
    until = time.monotonic() + LIMIT
    while process.poll() is None or processes(run):
        if time.monotonic() > until:
            left = processes(run)
            process.kill()
            for pid in left:
                os.kill(pid, 9)
            raise AssertionError(f"{len(left)} processes left after {LIMIT} seconds")
        if diary.exists() and diary.stat().st_size != size:  # the rank with the accident has written another line
            size, silent = diary.stat().st_size, time.monotonic()
        time.sleep(0.1)
    lived = time.monotonic() - silent
    return process.returncode, lived, run


def dead_rank(bench: Bench, launcher: str, rank: int) -> str:
    """SIGKILL for one of two ranks."""
    accident = callback("fault_callbacks.SignalAt", point="backward", step=4, rank=rank)
    code, seconds, run = two_ranks(bench, f"dead rank {rank}", launcher, accident, rank)
    said = " ".join((run / "log").read_text()[-600:].split())
    assert code != 0, f"exit code 0: {said}"
    assert seconds < RANKS_LIMIT, f"the last process ended after {seconds:.0f} seconds"
    assert last(run)["global_step"] == 4, said  # saved before the validation after batch 8
    return f"exit code {code}; no process was left after {seconds:.0f} s (limit {RANKS_LIMIT})"


def stopped_ranks(bench: Bench, launcher: str, rank: int) -> str:
    """SIGTERM for one of two ranks."""
    accident = callback("fault_callbacks.SignalAt", point="backward", step=4, name="SIGTERM", rank=rank)
    code, seconds, run = two_ranks(bench, f"SIGTERM rank {rank}", launcher, accident, rank)
    said = " ".join((run / "log").read_text()[-600:].split())
    assert code == 143, f"exit code {code}: {said}"
    assert last(run)["global_step"] == 5, said
    return f"both stopped after the same step and saved it; exit code 143, no process left after {seconds:.0f} s"


def poisoned_rank(bench: Bench) -> str:
    """NaN that only rank 1 can see."""
    accident = callback("fault_callbacks.Poison", batches=[4], rank=1)
    code, _, run = two_ranks(bench, "poisoned rank", "lightning", accident)
    assert code == 0, (run / "log").read_text()[-600:]
    end = last(run)
    skipped = next(state for name, state in end["callbacks"].items() if "SkipBadSteps" in name)["counts"][0]
    assert int(skipped) == 1
    check_finite(end)
    return "rank 0 skipped the step too: 1 counted there, weights, EMA and AdamW finite"


def may_mount() -> bool:
    """Whether small file systems can be had."""
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(["mount", "-t", "tmpfs", "faults", folder], capture_output=True, check=False)
        return tried.returncode == 0 and subprocess.run(["umount", folder], check=False).returncode == 0


def run_all(bench: Bench, kill_times: int) -> None:
    """Every fault."""
    for model in ("tokenizer", "ar"):
        bench.row(f"kill -9, {model}", kill_times, lambda model=model: kills(bench, model, kill_times))
    for model, name, point, code in (
        ("tokenizer", "SIGTERM", "backward", 143),
        ("ar", "SIGTERM", "backward", 143),
        ("tokenizer", "SIGTERM", "validation", 143),
        ("ar", "SIGINT", "step", 130),
    ):
        case = (bench, model, name, point, 7, code)
        bench.row(f"{name} in {point}, {model}", 1, lambda case=case: stopped(*case))
    bench.row("last.ckpt cut by the file system", 1, lambda: truncated(bench, "ar"))
    bench.row("NaN in one step, and in three in a row", 1, lambda: poisoned(bench, "tokenizer"))
    if may_mount():
        for how in ("full", "read_only"):
            bench.row(f"disk {how}, mended later", 1, lambda how=how: broken_disk(bench, "ar", how, 4, 10))
        bench.row("disk full until the end", 1, lambda: broken_disk(bench, "ar", "full", 4, 0))
        bench.row("folder read-only at the start", 1, lambda: read_only_start(bench, "ar"))
        bench.row("temporary folder full", 1, lambda: full_temp(bench, "ar"))
    else:
        print("disks that are full or read-only: skipped, mounting needs root")
    bench.row("NaN on rank 1 of 2", 1, lambda: poisoned_rank(bench))
    for launcher, rank in (("lightning", 0), ("lightning", 1), ("torchrun", 1)):
        case = (bench, launcher, rank)
        bench.row(f"kill -9 of rank {rank} of 2, {launcher}", 1, lambda case=case: dead_rank(*case))
    for launcher, rank in (("lightning", 0), ("lightning", 1)):
        case = (bench, launcher, rank)
        bench.row(f"SIGTERM to rank {rank} of 2, {launcher}", 1, lambda case=case: stopped_ranks(*case))


def processor() -> str:
    """Its name, where Linux tells it."""
    text = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in text if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores"


def main() -> None:
    """Read the command line, break things, print, write; exit code 1 if one of them was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each model")
    parser.add_argument("--only", nargs="+", default=[""], help="only faults whose names contain one of these words")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/faults.json")
    arguments = parser.parse_args()
    # A kill goes at least one step further than the one before.
    steps = max(20, 2 * arguments.kills + 10)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        bench = Bench(Path(folder), steps, arguments.only, arguments.output)
        run_all(bench, arguments.kills)
    sys.exit(0 if all(row["passed"] for row in bench.rows) else 1)


if __name__ == "__main__":
    main()
