"""The speed of the package: measured by row, by ratios to plain versions, and against another revision.

python -m benchmarks [rows] [--rows encode decode] [--sizes tiny v1] [--batches 1 8] [--device auto]
    [--dtype float32] [--compile none] [--seconds 2] [--max_tflop 3] [--output FILE.json]
python -m benchmarks against REVISION [--pairs 5] [the options of rows]
python -m benchmarks clock [--threads 2] [--budget 45] [--only quantizer] [--output benchmarks/results/clock.json]
python -m benchmarks table [--write docs/performance.md]
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import clock, measure
from benchmarks.machine import RESULTS, describe, store
from benchmarks.rows import ROWS, Setting
from dar_lightning.devices import choose_device, round_convolutions_as_products
from dar_lightning.errors import UserError
from dar_lightning.files import write_text

CHOICE = {  # options of `rows`
    "rows": {"nargs": "+", "choices": ROWS, "default": list(ROWS)},
    "sizes": {"nargs": "+", "default": ["tiny"], "help": "tiny, light, v1, B, L, XL; default: tiny"},
    "batches": {"nargs": "+", "type": int, "default": [], "help": "images a call, instead of a row's own"},
    "device": {"default": "auto"},
    "threads": {"type": int, "default": 0, "help": "0: torch's own number"},
    "dtype": {"choices": ("float32", "bfloat16"), "default": "float32"},
    "compile": {"choices": ("none", "default", "reduce-overhead"), "default": "none"},
    "tf32": {"action": "store_true", "help": "float32 products of GPUs in TF32"},
    "seconds": {"type": float, "default": 2.0, "help": "time for a row's calls"},
    "max_tflop": {"type": float, "help": "leave out calls of more; default: 3 on a CPU, no limit on a GPU"},
    "output": {"type": Path},
}


def read(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb")
    rows = verbs.add_parser("rows", help="latency, throughput, memory and FLOPs (the default)")
    pairs = verbs.add_parser("against", help="this checkout against a git revision, in pairs")
    for name, options in CHOICE.items():
        rows.add_argument(f"--{name}", **options)
        pairs.add_argument(f"--{name}", **options)
    pairs.add_argument("revision")
    pairs.add_argument("--pairs", type=int, default=5)
    ratios = verbs.add_parser("clock", help="ratios to plain versions on this CPU")
    ratios.add_argument("--threads", type=int, default=2)
    ratios.add_argument("--budget", type=float, default=45.0, help="seconds for each comparison's pairs")
    ratios.add_argument("--only", nargs="+", choices=clock.COMPARISONS, default=list(clock.COMPARISONS))
    ratios.add_argument("--tiny", action="store_true", help="smallest models: a test of the command, not a measurement")
    ratios.add_argument("--output", type=Path, default=RESULTS / "clock.json")
    table = verbs.add_parser("table", help="the ratios as Markdown")
    table.add_argument("--input", type=Path, default=RESULTS / "clock.json")
    table.add_argument("--write", type=Path, help="a page to put it into, between its markers")
    return parser.parse_args(argv if argv and argv[0] in (*verbs.choices, "-h", "--help") else ["rows", *argv])


def settings(given: argparse.Namespace) -> list[tuple[str, Setting]]:
    """What to measure: (row, setting)."""
    device, found = choose_device(given.device), []
    for name in given.rows:
        row = ROWS[name]
        dtype = getattr(torch, given.dtype) if row.lowers else torch.float32
        compiled = given.compile if row.compiles else "none"
        sizes = row.sizes if len(row.sizes) == 1 else [size for size in row.sizes if size in given.sizes]
        batches = given.batches or row.batches
        found += [(name, Setting(size, device, dtype, batch, compiled)) for size in sizes for batch in batches]
    if not found:
        raise UserError(f"sizes {', '.join(given.sizes)}: {', '.join(given.rows)} have none of them")
    return found


def run_rows(given: argparse.Namespace) -> dict:
    """Measure, print each row as it is done."""
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high" if given.tf32 else "highest")
    round_convolutions_as_products()
    device, chosen = choose_device(given.device), settings(given)
    limit = given.max_tflop or (3.0 if device.type == "cpu" else float("inf"))
    result = {"what": "calls of one process, medians", "machine": describe(device), "rows": []}
    for name, setting in chosen:
        result["rows"].append(measure.measure(name, setting, given.seconds, limit))
        print(json.dumps(result["rows"][-1]), flush=True)
    return result


def run_against(given: argparse.Namespace) -> dict:
    """Pairs of processes."""
    settings(given)  # its mistakes are told before anything runs
    options = ["--tf32"] if given.tf32 else []
    for name in CHOICE.keys() - {"tf32", "output"}:
        value = getattr(given, name)
        if value not in (None, []):
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    machine = describe(choose_device(given.device))
    rows = measure.against(given.revision, options, given.pairs, lambda text: print(text, file=sys.stderr))
    print(*map(json.dumps, rows), sep="\n")
    return {"what": f"this checkout against {given.revision}", "machine": machine, "rows": rows}


def main(argv: list[str]) -> None:
    """Read the command line, measure, print, write."""
    given = read(argv)
    if given.verb == "table":
        text = clock.table(json.loads(given.input.read_text()))
        if given.write:
            write_text(given.write, clock.inserted(given.write.read_text(), text))
        print(text)
        return
    result = {"rows": run_rows, "against": run_against, "clock": clock.run}[given.verb](given)
    store(given.output or RESULTS / f"{given.verb}-{choose_device(given.device).type}.json", result)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
