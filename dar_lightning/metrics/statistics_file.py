"""Stored reference statistics: ADM's npz files, and ours with their protocol."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path
from dar_lightning.generation.npz import UNREADABLE
from dar_lightning.metrics.frechet import Gaussian


class StoredStatistics(NamedTuple):
    """Mean and covariance out of a file."""

    statistics: Gaussian  # `mu` (D,) and `sigma` (D, D), as float64
    protocol: dict[str, Any] | None  # what they are statistics of; None in ADM's files: of TensorFlow's Inception
    has_images: bool  # `arr_0`; ADM's file has 10,000, of the many that its statistics are of

    def facts(self) -> dict[str, Any]:
        """What identifies them as a reference, for its protocol."""
        facts = {"n": self.statistics.count, "statistics": "mu and sigma as stored"}
        facts["statistics_sha256"] = sha256_of(self.statistics)
        return facts if self.protocol is None else facts | {"statistics_of": self.protocol}


def read_statistics(source: str, option: str) -> StoredStatistics | None:
    """The statistics of a reference; None of one that is no npz file with `mu` and `sigma`.

    Args:
        source: the reference.
        option: what the user calls it, for error lines.
    """
    if not (source.endswith(".npz") and Path(source).is_file()):
        return None
    try:
        with np.load(source) as arrays:
            if not {"mu", "sigma"} <= set(arrays.files):
                return None
            mu, sigma = arrays["mu"], arrays["sigma"]
            protocol = json.loads(str(arrays["protocol"])) if "protocol" in arrays.files else None
            has_images = "arr_0" in arrays.files
    except UNREADABLE as error:
        raise UserError(f"{option}: {source} is not a readable npz file ({error})") from error
    right = mu.ndim == 1 and sigma.shape == 2 * mu.shape and mu.dtype.kind == sigma.dtype.kind == "f"
    if not (right and np.isfinite(mu).all() and np.isfinite(sigma).all() and np.allclose(sigma, sigma.T)):
        raise UserError(
            f"{option}: mu and sigma of {source} must be a mean (D,) and a covariance (D, D), finite and symmetric; "
            f"are {mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}"
        )
    mean, covariance = (torch.from_numpy(array).double() for array in (mu, sigma))
    return StoredStatistics(Gaussian(mean, covariance, (protocol or {}).get("n")), protocol, has_images)


def write_statistics(path: str, statistics: Gaussian, protocol: dict[str, Any]) -> None:
    """Write an npz of statistics and their protocol, of which `n` and `features_sha256` are read again."""
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy(), "protocol": json.dumps(protocol)}
    with atomic_path(path) as part, open(part, "wb") as file:  # a name without .npz would get one
        np.savez(file, **arrays)


def sha256_of(statistics: Gaussian) -> str:
    """Of mean and covariance: what identifies a reference that is known by its statistics alone."""
    digest = hashlib.sha256(statistics.mean.numpy().tobytes())
    digest.update(statistics.covariance.numpy().tobytes())
    return digest.hexdigest()


def check_fits(stored: StoredStatistics, source: str, features: str, features_sha256: str) -> bool:
    """Whether stored statistics are of these features; if not, the images beside them must serve (or UserError)."""
    mark = None if stored.protocol is None else stored.protocol.get("features_sha256")
    if mark == features_sha256 if mark else features == "inception":
        return True
    if stored.has_images:
        return False
    whose = f"features {mark[:12]}" if mark else "TensorFlow's Inception"
    raise UserError(
        f"--reference: {source} holds statistics of {whose}; --features {features} is {features_sha256[:12]}"
    )
