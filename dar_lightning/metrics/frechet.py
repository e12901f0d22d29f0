"""Frechet distance between two sets of features, each described by a Gaussian."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Gaussian(NamedTuple):
    """What a set of features is reduced to: mean (D,), covariance (D, D), both float64, and the number of samples."""

    mean: Tensor
    covariance: Tensor
    count: int


class FeatureStatistics(Metric):
    """Mean and unbiased covariance of features that arrive in batches, in float64 and independent of the batching.

    The states are sums, so torchmetrics adds them over ranks.

    Args:
        dim: width D of the features.
    """

    full_state_update = False
    features_sum: Tensor
    products_sum: Tensor
    count: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.add_state("features_sum", torch.zeros(dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products_sum", torch.zeros(dim, dim, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Adds a batch of features, (B, D)."""
        features = features.double()
        self.features_sum += features.sum(dim=0)
        self.products_sum += features.T @ features
        self.count += features.shape[0]

    def compute(self) -> Gaussian:
        """Returns the Gaussian of all features seen so far.

        Raises:
            ValueError: with fewer than two samples, which have no covariance.
        """
        count = int(self.count)
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {count}")
        mean = self.features_sum / count
        covariance = (self.products_sum - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean, covariance, count)


def _factor(covariance: Tensor) -> Tensor:
    """A with A @ A.T = covariance, a symmetric matrix without negative eigenvalues."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    # Below this an eigenvalue is the rounding error of zero, and its root would be a hundred million times larger.
    rounding = eigenvalues[-1] * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return eigenvectors * torch.where(eigenvalues > rounding, eigenvalues, 0).sqrt()


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians.

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the formula of FID (Heusel et al., 2017). With S = A A^T, the trace
    of the root is the sum of the singular values of A1^T A2: real by construction, and, unlike a matrix square root,
    accurate when there are fewer samples than dimensions.
    """
    root_trace = torch.linalg.svdvals(_factor(first.covariance).T @ _factor(second.covariance)).sum()
    distance = (
        (first.mean - second.mean).square().sum()
        + first.covariance.trace()
        + second.covariance.trace()
        - 2 * root_trace
    )
    return max(distance.item(), 0.0)  # rounding may leave -1e-13 for identical sets
