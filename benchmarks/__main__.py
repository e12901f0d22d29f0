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
from benchmarks.machine import ROOT, describe
from benchmarks.rows import ROWS, Setting
from dar_lightning.devices import choose_device, round_convolutions_as_products
from dar_lightning.errors import UserError
from dar_lightning.files import write_text

RESULTS = ROOT / "benchmarks" / "results"
VERBS = ("rows", "against", "clock", "table")


def read(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    chosen.add_argument("--sizes", nargs="+", help="tiny, light, v1, B, L, XL; default: tiny")
    chosen.add_argument("--batches", nargs="+", type=int, help="images a call, instead of a row's own")
    chosen.add_argument("--device", default="auto")
    chosen.add_argument("--threads", type=int, default=0, help="0: torch's own number")
    chosen.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen.add_argument("--compile", choices=("none", "default", "reduce-overhead"), default="none")
    chosen.add_argument("--tf32", action="store_true", help="float32 products of GPUs in TF32")
    chosen.add_argument("--seconds", type=float, default=2.0, help="time for a row's calls")
    chosen.add_argument(
        "--max_tflop", type=float, help="leave out calls of more; default: 3 on a CPU, no limit on a GPU"
    )
    chosen.add_argument("--output", type=Path)
    verbs.add_parser("rows", parents=[chosen], help="latency, throughput, memory and FLOPs (the default)")
    pairs = verbs.add_parser("against", parents=[chosen], help="this checkout against a git revision, in pairs")
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
    return parser.parse_args(argv if argv and argv[0] in (*VERBS, "-h", "--help") else ["rows", *argv])


def settings(arguments: argparse.Namespace) -> list[tuple[str, Setting]]:
    """What to measure: (row, setting)."""
    device = choose_device(arguments.device)
    sizes = arguments.sizes or ["tiny"]
    found = []
    for name in arguments.rows:
        row = ROWS[name]
        for size in row.sizes if len(row.sizes) == 1 else [s for s in row.sizes if s in sizes]:
            for batch in arguments.batches or row.batches:
                compiled = arguments.compile if row.compiles else "none"
                dtype = getattr(torch, arguments.dtype) if row.lowers else torch.float32
                found.append((name, Setting(size, device, dtype, batch, compiled)))
    if not found:
        raise UserError(f"sizes {', '.join(sizes)}: {', '.join(arguments.rows)} have none of them")
    return found


def run_rows(arguments: argparse.Namespace) -> dict:
    """Measure, print each row as it is done."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high" if arguments.tf32 else "highest")
    round_convolutions_as_products()
    chosen = settings(arguments)
    device = chosen[0][1].device
    limit = arguments.max_tflop or (3.0 if device.type == "cpu" else float("inf"))
    result = {"what": "calls of one process, medians", "machine": describe(device), "rows": []}
    for name, setting in chosen:
        result["rows"].append(measure.measure(name, setting, arguments.seconds, limit))
        print(json.dumps(result["rows"][-1]), flush=True)
    return result


def run_against(arguments: argparse.Namespace) -> dict:
    """Pairs of processes."""
    settings(arguments)  # its mistakes are told before anything runs
    options = ["--rows", *arguments.rows, "--sizes", *(arguments.sizes or ["tiny"])]
    options += ["--batches", *map(str, arguments.batches)] if arguments.batches else []
    options += ["--tf32"] if arguments.tf32 else []
    options += [f"--max_tflop={arguments.max_tflop}"] if arguments.max_tflop else []
    options += [f"--{name}={getattr(arguments, name)}" for name in ("device", "threads", "dtype", "compile", "seconds")]
    machine = describe(choose_device(arguments.device))
    rows = measure.against(arguments.revision, options, arguments.pairs, lambda text: print(text, file=sys.stderr))
    for row in rows:
        print(json.dumps(row))
    return {"what": f"this checkout against {arguments.revision}", "machine": machine, "rows": rows}


def main(argv: list[str]) -> None:
    """Read the command line, measure, print, write."""
    arguments = read(argv)
    if arguments.verb == "table":
        text = clock.table(json.loads(arguments.input.read_text()))
        if arguments.write:
            write_text(arguments.write, clock.inserted(arguments.write.read_text(), text))
        print(text)
        return
    run = {"rows": run_rows, "against": run_against, "clock": clock.run}[arguments.verb]
    output = arguments.output or RESULTS / f"{arguments.verb}-{choose_device(arguments.device).type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    result = run(arguments)
    write_text(output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
