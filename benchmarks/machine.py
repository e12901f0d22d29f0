"""Which machine, versions and threads a result is of, and what the machine's own limits are."""

import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def describe(device: torch.device) -> dict:
    """For a result's JSON."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "other_load": load,  # processes that were running when this began
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
    if commit.returncode:
        return None
    changed = subprocess.run([*git, "status", "--short", "-uno"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + ("+" if changed.stdout else "")


def limits(device: torch.device) -> dict[str, float]:
    """What bare products and reads reach here: the medians of a second or so each.

    Returns:
        "float32_gflops" and "bfloat16_gflops" of a product as large as an MLP of v1's decoder; "read_gb_per_s" of
        matrix-vector products over one gigabyte of float32 weights, more than any cache holds.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1024, 768, device=device).to(dtype)
        weight = torch.randn(3072, 768, device=device).to(dtype)
        seconds = typical_seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device)
        found[f"{str(dtype).removeprefix('torch.')}_gflops"] = 2 * 1024 * 768 * 3072 / seconds / 1e9
    weights, x = torch.randn(2**28 // 1024, 1024, device=device), torch.randn(1024, device=device)
    found["read_gb_per_s"] = weights.nbytes / typical_seconds(lambda: weights @ x, device) / 1e9
    return found


def typical_seconds(work, device: torch.device, budget: float = 1.0) -> float:
    """Median duration of a call, of as many as fit into the budget, after one that warms up."""
    work()
    durations, end = [], time.perf_counter() + budget
    while len(durations) < 3 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
