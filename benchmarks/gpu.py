"""What a GPU shows in one call of at most eight minutes: right numbers, no waits, speed against what the device allows.

python -m benchmarks.gpu --output FOLDER [--only 5 7] [--rehearse]

Each item runs in a process of its own, which may crash or be cut without stopping the next. FOLDER gets a JSON line a
row (gpu.jsonl), what each item printed (item1.log, ...), and a table (gpu.md), which is printed, too. It ends with 1 if
a goal is missed. --rehearse runs the same code at tiny sizes on a CPU, in this process and with nothing compiled: it
judges what is right, not what is fast.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from benchmarks import gpu_generation, gpu_training
from benchmarks.gpu_bench import Bench
from benchmarks.machine import ROOT, options
from dar_lightning.devices import choose_device, round_convolutions_as_products
from dar_lightning.errors import UserError
from dar_lightning.files import write_text

LIMIT = 480.0  # seconds, of all items together
LINES = "gpu.jsonl"


class Item(NamedTuple):
    """One check: `run` yields its rows; after `seconds` it is cut."""

    name: str
    run: Callable[[Bench], Iterator[dict]]
    seconds: float


ITEMS = {
    1: Item("machine, goldens, tokens", gpu_generation.numbers, 60),
    2: Item("attention on new threads", gpu_generation.threads, 60),
    3: Item("memory of six calls", gpu_generation.memory, 60),
    4: Item("FID over NCCL", gpu_training.frechet, 60),
    5: Item("tokenizer training", gpu_training.tokenizer, 150),
    6: Item("AR training", gpu_training.ar, 120),
    7: Item("a token", gpu_generation.tokens, 150),
    8: Item("decoding", gpu_generation.decoding, 120),
    9: Item("FSDP2", gpu_training.sharded, 60),
    10: Item("100 steps", gpu_training.falls, 60),
}
ORDER = (1, 7, 5, 6, 8, 4, 9, 10, 3, 2)  # where time is short, the last are missing


def isolated(command: Sequence[str], rows: Path, log: Path, seconds: float) -> Iterator[dict]:
    """Rows that a process writes into a file before it ends, crashes or is cut; the latter two are a row, too."""
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # with the compiler's workers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if rows.exists():
        yield from map(json.loads, rows.read_text().splitlines())
    if code != 0:
        last = (log.read_text(errors="replace").split("\n\n")[-1].strip().splitlines() or ["no word"])[-1]
        what = f"cut after {seconds:.0f} s" if code is None else f"crashed with {code}: {last}"
        yield {"what": what, "passed": False}


def rehearsed(item: Item) -> Iterator[dict]:
    """Rows of an item at tiny size; a crash is a row."""
    with TemporaryDirectory(prefix="rehearsal-") as folder, torch.compiler.set_stance("force_eager"):
        try:
            yield from item.run(Bench(choose_device("cpu"), False, Path(folder)))
        except Exception as error:
            traceback.print_exc()
            yield {"what": f"crashed: {type(error).__name__}: {error}", "passed": False}


def child(item: Item, rows: Path) -> None:
    """One item at full size, in this process."""
    round_convolutions_as_products()
    with TemporaryDirectory(prefix="gpu-") as folder, rows.open("a") as file:
        for row in item.run(Bench(choose_device("cuda"), True, Path(folder))):
            print(json.dumps(row), file=file, flush=True)


def results(given: Namespace, folder: Path) -> Iterator[dict]:
    """The rows of all items that are asked for, as they are done."""
    end = time.perf_counter() + LIMIT
    for number in [number for number in ORDER if number in given.only or not any(given.only)]:
        item = ITEMS[number]
        if given.rehearse:
            rows = rehearsed(item)
        else:
            path, log = folder / f"item{number}.jsonl", folder / f"item{number}.log"
            path.unlink(missing_ok=True)
            command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(path), "--child", str(number)]
            rows = isolated(command, path, log, min(item.seconds, end - time.perf_counter()))
        yield from ({"item": number, "name": item.name} | row for row in rows)


def table(rows: Sequence[dict]) -> str:
    """Rows as Markdown, in the order of the items."""
    lines = ["| item | what | value | floor | ratio | goal | |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["item"]):
        value, floor, ratio = (row.get(name) for name in ("value", "floor", "ratio"))
        unit = row.get("unit", "")
        shown = ["" if number is None else f"{number:.4g} {unit}".strip() for number in (value, floor)]
        ratio = "" if ratio is None else f"{ratio:.3g}"
        judged = {True: "passed", False: "FAILED", None: ""}[row["passed"]]
        cells = [f"{row['item']} {row['name']}", row["what"], *shown, ratio, row.get("goal", ""), judged]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Run the items; returns the exit code."""
    given = options(__doc__, argv, output="", only=[0], rehearse=False, child=0)
    if given.child:
        child(ITEMS[given.child], Path(given.output))
        return 0
    if not given.output:
        raise UserError("output is missing: give a folder for the results")
    if unknown := {*given.only} - {0, *ITEMS}:
        raise UserError(f"only: {min(unknown)} is no item, they are 1 to {len(ITEMS)}")
    if not given.rehearse:
        choose_device("cuda")  # says so if there is none
    folder, found = Path(given.output).absolute(), []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LINES).open("w") as file:
        for row in results(given, folder):
            found.append(row)
            for out in (file, sys.stdout):
                print(json.dumps(row), file=out, flush=True)
    write_text(folder / "gpu.md", table(found))
    print(table(found), end="")
    return int(any(row["passed"] is False for row in found))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
