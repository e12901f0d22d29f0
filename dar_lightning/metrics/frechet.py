"""Frechet distance between two sets of features, each described by a Gaussian, which may be stored in an npz file."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from dar_lightning.errors import UserError, require
from dar_lightning.files import atomic_path
from dar_lightning.generation.npz import UNREADABLE


class Gaussian(NamedTuple):
    """What a set of features is reduced to; statistics that others have stored may not say the number of samples."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    count: int | None


class FeatureStatistics(Metric):
    """Mean and unbiased covariance of features that arrive in batches, in float64 and independent of the batching.

    torchmetrics' FID keeps the same sums, but runs its own network, takes no stored statistics, and multiplies the two
    covariances before it takes the eigenvalues, which loses half of the digits where they are singular.
    """

    full_state_update = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_state("features_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products_sum", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add a batch of features, (B, D)."""
        features = features.double()
        self.features_sum += features.sum(dim=0)
        self.products_sum += features.T @ features
        self.count += features.shape[0]

    def compute(self) -> Gaussian:
        """Of all features so far; a UserError with fewer than two, which have no covariance."""
        count = int(self.count)
        require(count >= 2, f"a Frechet distance needs at least 2 images on each side, got {count}")
        mean = self.features_sum / count
        covariance = (self.products_sum - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean, covariance, count)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: `|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`."""
    if first.mean.shape != second.mean.shape:
        dims = f"{len(second.mean)} and of {len(first.mean)}"
        raise UserError(f"statistics of {dims} features cannot be compared: they are of different networks")
    traces = first.covariance.trace() + second.covariance.trace() - 2 * root_trace(first, second)
    distance = (first.mean - second.mean).square().sum() + traces
    return max(distance.item(), 0.0)  # rounding may leave -1e-13 for identical sets


def root_trace(first: Gaussian, second: Gaussian) -> Tensor:
    """tr (S1 S2)^(1/2), without the root of the matrix, which is slow and inaccurate where S1 S2 is singular.

    With S1 = A A^T, S1 S2 has the eigenvalues of the symmetric A^T S2 A, none negative; of these the roots are summed.
    A covariance of fewer samples than dimensions has no Cholesky factor: then A has a column per eigenvector that is
    not null. Eigenvalues below D eps times the largest count as zero: they are rounding, whose root would be 1e-8 of
    the largest. At D = 2048 it takes a quarter of the time of scipy's sqrtm (`benchmarks/frechet.py`).
    """
    fewer, more = sorted((first, second), key=lambda gaussian: gaussian.count or math.inf)
    factor, failed = torch.linalg.cholesky_ex(covariance := fewer.covariance.cpu())
    if failed:
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        kept = _above_rounding(eigenvalues)
        factor = eigenvectors[:, kept] * eigenvalues[kept].sqrt()  # (D, rank)
    eigenvalues = torch.linalg.eigvalsh(factor.T @ more.covariance.cpu() @ factor)
    return eigenvalues[_above_rounding(eigenvalues)].sqrt().sum()


def _above_rounding(eigenvalues: Tensor) -> Tensor:
    """Which of the ascending eigenvalues (n,) are more than the rounding error of zero."""
    return eigenvalues > eigenvalues[-1:].sum() * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps


class StoredStatistics(NamedTuple):
    """Reference statistics out of a file: ADM's, or ours with their protocol."""

    statistics: Gaussian
    protocol: dict[str, Any] | None  # what they are statistics of; None in ADM's files: of TensorFlow's Inception
    has_images: bool  # `arr_0`; ADM's file has 10,000, of the many that its statistics are of

    def facts(self) -> dict[str, Any]:
        """What identifies them as a reference, for its protocol."""
        facts = {"n": self.statistics.count, "statistics": "mu and sigma as stored"}
        facts["statistics_sha256"] = sha256_of(self.statistics)
        return facts if self.protocol is None else facts | {"statistics_of": self.protocol}


def read_statistics(source: str, option: str) -> StoredStatistics | None:
    """The statistics of a reference, None of one that is no npz file with `mu` and `sigma`; errors name the option."""
    if not (source.endswith(".npz") and Path(source).is_file()):
        return None
    try:
        with np.load(source) as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                return None
            mu, sigma, has_images = arrays["mu"], arrays["sigma"], "arr_0" in arrays.files
            protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays.files else None
    except UNREADABLE as error:
        raise UserError(f"{option}: {source} is not a readable npz file ({error})") from error
    right = mu.ndim == 1 and sigma.shape == 2 * mu.shape and mu.dtype.kind == sigma.dtype.kind == "f"
    if not (right and np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T)):
        wanted = "must be a mean (D,) and a covariance (D, D), finite and symmetric"
        found = f"are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}"
        raise UserError(f"{option}: mu and sigma of {source} {wanted}; {found}")
    mean, covariance = (torch.from_numpy(array).double() for array in (mu, sigma))
    return StoredStatistics(Gaussian(mean, covariance, (protocol or {}).get("n")), protocol, has_images)


def write_statistics(path: str, statistics: Gaussian, protocol: dict[str, Any]) -> None:
    """Write an npz of statistics and their protocol, of which `n` and `features_sha256` are read again."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy(), "protocol": json.dumps(protocol)}
    with atomic_path(path) as part, open(part, "wb") as file:  # a name without .npz would get one
        np.savez(file, **arrays)


def sha256_of(statistics: Gaussian) -> str:
    """Of mean and covariance: what identifies a reference that is known by its statistics alone."""
    return hashlib.sha256(statistics.mean.numpy().tobytes() + statistics.covariance.numpy().tobytes()).hexdigest()


def check_fits(stored: StoredStatistics, source: str, features: str, features_sha256: str, option: str) -> bool:
    """Whether stored statistics are of these features; if not, the images beside them must serve (or UserError).

    `option` is what the user calls the reference, for the error line.
    """
    mark = (stored.protocol or {}).get("features_sha256")
    if mark == features_sha256 if mark else features == "inception":
        return True
    if stored.has_images:
        return False
    whose = f"features {mark[:12]}" if mark else "TensorFlow's Inception"
    mine = f"features {features} is {features_sha256[:12]}"
    raise UserError(f"{option}: {source} holds statistics of {whose}; {mine}")
