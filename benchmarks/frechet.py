"""The Frechet distance's trace of a root, against scipy.linalg.sqrtm of the product: time and agreement.

Covariances of 2048 dimensions, as those of Inception: of 10,000 samples, and of 1,000, which leave them singular. The
features are correlated, partly rectified, and their scales span two decades. One thread, so that others on the machine
disturb less.

    OPENBLAS_NUM_THREADS=1 python benchmarks/frechet.py [--dim 2048] [--repetitions 3] [--output FILE.json]
"""

import statistics

import scipy.linalg
import torch

from benchmarks.machine import RESULTS, in_turns, options, ratio, record
from dar_lightning.metrics.frechet import Gaussian, root_trace


def gaussian(count: int, dim: int, seed: int) -> Gaussian:
    """Statistics of `count` synthetic features."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    scales = torch.logspace(0, -2, dim, dtype=torch.float64)
    features = torch.randn(count, dim, generator=generator, dtype=torch.float64) * scales @ rotation
    features = torch.nn.functional.leaky_relu(features, 0.1)
    return Gaussian(features.mean(dim=0), torch.cov(features.T), count)


def measure(count: int, dim: int, repetitions: int) -> dict:
    """One row of the result."""
    first, second = gaussian(count, dim, 1), gaussian(count + 7, dim, 2)
    product = (first.covariance @ second.covariance).numpy()
    works = {
        "ours": lambda: root_trace(first, second).item(),
        "scipy": lambda: float(scipy.linalg.sqrtm(product).real.trace()),
    }
    seconds = in_turns(works, least=repetitions)
    return {
        "samples": count,
        "dim": dim,
        **{f"{name}_seconds": round(statistics.median(taken), 2) for name, taken in seconds.items()},
        "ratio": ratio(seconds, "scipy", "ours"),
        "relative_difference": float(f"{abs(works['ours']() / works['scipy']() - 1):.1e}"),
    }


if __name__ == "__main__":
    given = options(__doc__, dim=2048, repetitions=3, output=RESULTS / "frechet.json")
    torch.set_num_threads(1)
    what = "tr (S1 S2)^(1/2) against the trace of scipy.linalg.sqrtm(S1 @ S2), one thread"
    rows = (measure(count, given.dim, given.repetitions) for count in (10_000, 1_000))
    record(given.output, what, rows, scipy=scipy.__version__, repetitions=given.repetitions)
