"""What all benchmarks share: machine and versions beside a result, timing in turns, options, JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dar_lightning.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")


def options(description: str, **defaults) -> argparse.Namespace:
    """The command line of a benchmark: --NAME of its default's type, one or more where the default is a list."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name, default in defaults.items():
        several = isinstance(default, list)
        kind = {"nargs": "+", "type": type(default[0])} if several else {"type": type(default)}
        parser.add_argument(f"--{name}", default=default, help=f"default: {default}", **kind)
    return parser.parse_args()


def store(output: Path, result: dict) -> None:
    """Write a result as JSON."""
    write_text(output, json.dumps(result, indent=2) + "\n")


def child_environment(root: Path = ROOT) -> dict[str, str]:
    """For a process of one thread that imports the package of this checkout, or of another."""
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def describe(device: torch.device = CPU) -> dict:
    """Machine, versions, precision and commit, for a result's JSON."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "other_load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # processes running before this
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "revision": revision(),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def revision() -> str | None:
    """The commit, with a plus if files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--short", "-uno"], capture_output=True, text=True, check=False)
    return None if commit.returncode else commit.stdout.strip() + ("+" if changed.stdout else "")


def in_turns(
    works: Mapping[str, Callable[[], object]],
    device: torch.device = CPU,
    budget: float = 0.0,
    least: int = 3,
    most: int = 10**6,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each work by name, all called in turn, so that a busy machine slows all alike.

    Args:
        works: what is compared. The order changes from round to round.
        device: whose work is waited for.
        budget: seconds for all rounds.
        least: rounds, whatever the budget.
        most: rounds.
        warm: each has been called before; otherwise a first call is not counted.
    """
    for work in works.values() if not warm else ():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    rounds, end = 0, time.perf_counter() + budget
    while rounds < least or (rounds < most and time.perf_counter() < end):
        for name in list(works)[:: 1 if rounds % 2 == 0 else -1]:
            synchronize(device)
            start = time.perf_counter()
            works[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
        rounds += 1
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median over neighbours."""
    return round(statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True)), 3)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device) -> dict[str, float]:
    """What bare products and reads reach here: the medians of a second or so each.

    Returns:
        "float32_gflops" and "bfloat16_gflops" of a product as large as an MLP of v1's decoder; "read_gb_per_s" of
        matrix-vector products over one gigabyte of float32 weights, more than any cache holds.
    """
    x, weight = torch.randn(1024, 768, device=device), torch.randn(3072, 768, device=device)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    large, vector = torch.randn(2**28 // 1024, 1024, device=device), torch.randn(1024, device=device)
    product, amount = torch.nn.functional.linear, 2 * 1024 * 768 * 3072 / 1e9
    works = {
        "float32_gflops": (lambda: product(x, weight), amount),
        "bfloat16_gflops": (lambda: product(half, half_weight), amount),
        "read_gb_per_s": (lambda: large @ vector, large.nbytes / 1e9),
    }
    return {
        name: amount / statistics.median(in_turns({name: work}, device, budget=1.0)[name])
        for name, (work, amount) in works.items()
    }
