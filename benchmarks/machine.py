"""What all benchmarks share: options, results as JSON with machine and versions beside them, timing in turns."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dar_lightning.files import write_text
from dar_lightning.records.provenance import read_code

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")


def options(description: str, argv: Sequence[str] | None = None, **defaults) -> argparse.Namespace:
    """The command line of a benchmark: --NAME of its default's type; several where that is a list, a flag for False."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in defaults.items():
        if default is False:
            kind = {"action": "store_true"}
        elif isinstance(default, list):
            kind = {"nargs": "+", "type": type(default[0]), "help": f"default: {' '.join(map(str, default))}"}
        else:
            kind = {"type": type(default), "help": f"default: {default}"}
        parser.add_argument(f"--{name}", default=default, **kind)
    return parser.parse_args(argv)


def record(
    output: Path, what: str, rows: Iterable[dict], device: torch.device = CPU, key: str | None = None, **facts
) -> list[dict]:
    """Print rows as they are done, and store them as JSON with the machine, so that a cut loses none that is finished.

    With a key, rows that the file has from before stay, but for those whose value of this key is measured again.
    """
    before = json.loads(output.read_text())["rows"] if key and output.exists() else []
    result = {"what": what, "machine": describe(device), **facts, "rows": before}
    for row in rows:
        print(json.dumps(row), flush=True)
        result["rows"] = [old for old in result["rows"] if not key or old[key] != row[key]] + [row]
        write_text(output, json.dumps(result, indent=2) + "\n")
    return result["rows"]


def child_environment(root: Path = ROOT) -> dict[str, str]:
    """For a process of one thread that imports the package of this checkout, or of another."""
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def describe(device: torch.device = CPU) -> dict:
    """Machine, versions, precision and commit, with a plus if files differ from it, for a result's JSON."""
    info, code, cuda = Path("/proc/cpuinfo"), read_code(), device.type == "cuda"
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "other_load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # processes running before this
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "revision": code["commit"] and code["commit"][:7] + ("+" if code["changed"] else ""),
    }


def in_turns(
    works: Mapping[str, Callable[[], object]],
    device: torch.device = CPU,
    budget: float = 0.0,
    least: int = 3,
    most: int = 10**6,
    warm: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each work by name, all called in turn, so that a busy machine slows all alike; `clock` tells them.

    The order changes from round to round. There are `least` rounds, and `most` within `budget` seconds. The first call
    of a work that is not `warm` is not counted.
    """
    for work in works.values() if not warm else ():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    rounds, end = 0, time.perf_counter() + budget
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for name in list(works)[:: 1 if rounds % 2 == 0 else -1]:
            synchronize(device)
            start = clock()
            works[name]()
            synchronize(device)
            seconds[name].append(clock() - start)
        rounds += 1
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median over neighbours."""
    return round(statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True)), 3)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
