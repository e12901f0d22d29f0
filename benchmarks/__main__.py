"""The speed of the package: measured by row, by ratios to plain versions, and against another revision.

python -m benchmarks [rows] [--rows encode decode] [--sizes tiny v1] [--batches 1 8] [--device auto]
    [--dtype float32] [--compile none] [--seconds 2] [--max_tflop 3] [--output FILE.json]
python -m benchmarks against REVISION [--pairs 5] [the options of rows]
python -m benchmarks clock [--threads 2] [--budget 45] [--only quantizer] [--output benchmarks/results/clock.json]
python -m benchmarks official [the options of clock]
python -m benchmarks table [--input benchmarks/results/official.json] [--write docs/performance.md]
"""

import json
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from benchmarks import clock, measure, official
from benchmarks.machine import RESULTS, options, record
from benchmarks.rows import ROWS, Setting
from dar_lightning.devices import choose_device, round_convolutions_as_products
from dar_lightning.errors import UserError
from dar_lightning.files import write_text

# Sizes are tiny, light, v1, B, L, XL. 0 is a row's own batches, torch's own threads, and no limit on a GPU, 3 on a CPU.
OPTIONS = {"rows": [*ROWS], "sizes": ["tiny"], "batches": [0], "device": "auto", "threads": 0, "dtype": "float32"}
OPTIONS |= {"compile": "none", "tf32": False, "seconds": 2.0, "max_tflop": 0.0}


def settings(given: Namespace) -> list[tuple[str, Setting]]:
    """What to measure: (row, setting)."""
    device, found = choose_device(given.device), []
    for name in given.rows:
        if name not in ROWS:
            raise UserError(f"rows: {name} is none of {', '.join(ROWS)}")
        row = ROWS[name]
        dtype = getattr(torch, given.dtype) if row.lowers else torch.float32
        compiled = given.compile if row.compiles else "none"
        sizes = row.sizes if len(row.sizes) == 1 else [size for size in row.sizes if size in given.sizes]
        batches = row.batches if given.batches == [0] else given.batches
        found += [(name, Setting(size, device, dtype, batch, compiled)) for size in sizes for batch in batches]
    if not found:
        raise UserError(f"sizes {', '.join(given.sizes)}: {', '.join(given.rows)} have none of them")
    return found


def rows(argv: list[str]) -> None:
    """Latency, throughput, memory and FLOPs."""
    given = options(__doc__, argv, **OPTIONS, output="")
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high" if given.tf32 else "highest")
    round_convolutions_as_products()
    device, chosen = choose_device(given.device), settings(given)
    limit = given.max_tflop or (3.0 if device.type == "cpu" else float("inf"))
    measured = (measure.measure(name, setting, given.seconds, limit) for name, setting in chosen)
    output = given.output or RESULTS / f"rows-{device.type}.json"
    record(Path(output), "calls of one process, medians", measured, device)


def against(argv: list[str]) -> None:
    """This checkout against a git revision, in pairs of processes."""
    revision, *argv = argv
    given = options(__doc__, argv, **OPTIONS, pairs=5, output="")
    settings(given)  # its mistakes are told before anything runs
    words = ["--tf32"] if given.tf32 else []
    for name in OPTIONS.keys() - {"tf32"}:
        value = getattr(given, name)
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    device = choose_device(given.device)
    output = given.output or RESULTS / f"against-{device.type}.json"
    record(Path(output), f"this checkout against {revision}", measure.against(revision, words, given.pairs), device)


def table(argv: list[str]) -> None:
    """The ratios of a result as Markdown, put into a page between the markers of its name."""
    given = options(__doc__, argv, input=RESULTS / "clock.json", write="")
    text = clock.table(json.loads(given.input.read_text()))
    if given.write:
        write_text(given.write, clock.inserted(Path(given.write).read_text(), text, given.input.stem))
    print(text)


OFFICIAL = partial(clock.run, comparisons=official.ROWS, threads=1, clock=time.process_time, name="official")
VERBS = {"rows": rows, "against": against, "clock": clock.run, "official": OFFICIAL, "table": table}


def main(argv: list[str]) -> None:
    """Run a verb; without one, rows."""
    verb, *words = argv if argv and argv[0] in VERBS else ["rows", *argv]
    VERBS[verb](words)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
