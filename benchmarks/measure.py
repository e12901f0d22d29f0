"""Measuring rows: latency, throughput, peak memory, FLOPs; and the same against another revision, in pairs."""

import gc
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.machine import ROOT, in_turns, ratio, synchronize
from benchmarks.rows import ROWS, Setting
from dar_lightning.devices import dtype_name

SAME = ("row", "size", "batch", "dtype", "compile")


def measure(name: str, setting: Setting, seconds: float, max_tflop: float) -> dict:
    """One row of the result, of at least three calls that go on for some seconds.

    Larger calls than max_tflop are not made.
    """
    row = ROWS[name]
    result = dict(
        zip(SAME, (name, setting.size, setting.batch, dtype_name(setting.dtype), setting.compile), strict=True)
    )
    images, flops = row.images(setting), row.flops(setting)
    if flops is not None:
        result["gflop_per_image"] = round(flops / 1e9, 3)
        if flops * images > max_tflop * 1e12:
            return result | {"skipped": f"{flops * images / 1e12:.1f} TFLOP a call, more than max_tflop {max_tflop}"}
    call = row.build(setting)
    call()
    synchronize(setting.device)
    before = start_memory(setting.device)
    durations = in_turns({"call": call}, setting.device, seconds, warm=True)["call"]
    latency = statistics.median(durations)
    result |= {
        "calls": len(durations),
        "latency_seconds": float(f"{latency:.4g}"),
        "fastest_seconds": float(f"{min(durations):.4g}"),
        "images_per_second": float(f"{images / latency:.4g}") if images else None,
        "peak_memory_mb": peak_memory(setting.device),
        "memory_before_mb": before,  # weights, and on a CPU the interpreter with its libraries
    }
    return result if flops is None else result | {"gflops": round(flops * images / latency / 1e9, 1)}


def start_memory(device: torch.device) -> float | None:
    """Forget the peak so far; megabytes in use now, where they can be told."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (forget := Path("/proc/self/clear_refs")).exists():
        forget.write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device) -> float | None:
    """Megabytes: allocated on a GPU, resident on a CPU under Linux, None elsewhere."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) * 1.024e-3, 1) for line in lines if line.startswith("VmHWM")), None)


def against(revision: str, words: list[str], pairs: int) -> list[dict]:
    """This checkout against a revision of it: each row by processes in turn, ours first in every other pair.

    Both sides run the benchmarks of this checkout, with these words; of the revision comes the package.

    Returns:
        Rows with the latencies of each side, and "speedup": the median of theirs over ours.
    """
    with TemporaryDirectory(prefix="revision-") as folder:
        other, output = Path(folder) / "checkout", Path(folder) / "rows.json"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(other), revision], check=True)
        command = [sys.executable, "-m", "benchmarks", "rows", *words, "--output", str(output)]
        try:
            shutil.rmtree(other / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", other / "benchmarks", ignore=shutil.ignore_patterns("results"))
            found: dict[Path, list[list[dict]]] = {ROOT: [], other: []}
            for pair in range(pairs):
                for checkout in (ROOT, other) if pair % 2 == 0 else (other, ROOT):
                    print(f"pair {pair + 1} of {pairs}: {revision if checkout == other else 'this'}", file=sys.stderr)
                    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
                    found[checkout].append(json.loads(output.read_text())["rows"])
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)
    sides = [zip(*side, strict=True) for side in found.values()]
    return [_compare(*rows) for rows in zip(*sides, strict=True)]


def _compare(ours: tuple[dict, ...], theirs: tuple[dict, ...]) -> dict:
    """One row of all pairs."""
    row = {key: ours[0][key] for key in SAME}
    if "skipped" in ours[0]:
        return row | {"skipped": ours[0]["skipped"]}
    seconds = {"seconds": [one["latency_seconds"] for one in ours]}
    seconds |= {"revision_seconds": [one["latency_seconds"] for one in theirs]}
    return row | seconds | {"speedup": ratio(seconds, "revision_seconds", "seconds")}
