"""The Frechet distance's trace of a root, against scipy.linalg.sqrtm of the product: time and agreement.

Covariances of 2048 dimensions, as those of Inception: of 10,000 samples, and of 1,000, which leave them singular. The
features are correlated, partly rectified, and their scales span two decades. One thread, so that others on the machine
disturb less; repetitions of the two alternate, and the ratio is the median of neighbours.

    OPENBLAS_NUM_THREADS=1 python benchmarks/frechet.py [--dim 2048] [--repetitions 3] [--output FILE.json]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import scipy.linalg
import torch

from dar_lightning.files import write_text
from dar_lightning.metrics.frechet import Gaussian, root_trace


def gaussian(count: int, dim: int, seed: int) -> Gaussian:
    """Statistics of `count` synthetic features."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -2, dim, dtype=torch.float64)
    features = torch.randn(count, dim, generator=generator, dtype=torch.float64) * scales @ rotation
    features = torch.nn.functional.leaky_relu(features, 0.1)
    return Gaussian(features.mean(dim=0), torch.cov(features.T), count)


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """(seconds, value)"""
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, value


def measure(count: int, dim: int, repetitions: int) -> dict:
    """One row of the result."""
    first, second = gaussian(count, dim, 1), gaussian(count + 7, dim, 2)
    product = (first.covariance @ second.covariance).numpy()
    ours, theirs = [], []
    for _ in range(repetitions):
        ours.append(timed(lambda: root_trace(first, second).item()))
        theirs.append(timed(lambda: float(scipy.linalg.sqrtm(product).real.trace())))
    return {
        "samples": count,
        "dim": dim,
        "ours_seconds": round(statistics.median(seconds for seconds, _ in ours), 2),
        "scipy_seconds": round(statistics.median(seconds for seconds, _ in theirs), 2),
        "ratio": round(statistics.median(b / a for (a, _), (b, _) in zip(ours, theirs, strict=True)), 2),
        "relative_difference": float(f"{abs(ours[0][1] / theirs[0][1] - 1):.1e}"),
    }


def processor() -> str:
    """The model of this machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/frechet.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = [measure(count, arguments.dim, arguments.repetitions) for count in (10_000, 1_000)]
    result = {
        "what": "tr (S1 S2)^(1/2) against the trace of scipy.linalg.sqrtm(S1 @ S2), one thread",
        "processor": processor(),
        "other_load": round(load, 2),  # processes that were running when this began
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "repetitions": arguments.repetitions,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
