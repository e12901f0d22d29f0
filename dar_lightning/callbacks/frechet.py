"""What the Frechet distances of a training run share: a network outside of the module, sums over ranks, a protocol."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from dar_lightning.errors import UserError
from dar_lightning.losses.frozen import FrozenNetwork
from dar_lightning.metrics.features import feature_protocol, frechet_name, load_features
from dar_lightning.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from dar_lightning.metrics.measure import float64_device
from dar_lightning.metrics.protocol import FRECHET, versions, write_figures


class FrechetCallback(Callback):
    """Logs a Frechet distance in validations, on EMA weights if the run averages them.

    All work that needs weights is done after validation batches: there EMAWeightAveraging has its weights in place,
    wherever it stands in the list of callbacks. The feature network and the statistics belong to the callback, so
    checkpoints and EMA copies do not have them.

    Each value is also written, with its protocol, to `evaluation/` in the run's folder, as `dar evaluate` writes it.

    Args:
        prefix: of the name: "r" gives val/rFID, and val/rFD-<name> with any other network than Inception.
        features: a feature network's name, see `metrics.features.load_features`.
        features_weights: a local file of its weights; None downloads them.
        every_n_steps: measure in validations at multiples of so many training steps, whenever the run was resumed.
    """

    def __init__(self, prefix: str, features: str, features_weights: str | None, every_n_steps: int):
        if every_n_steps < 1:
            raise UserError(
                f"every_n_steps is {every_n_steps}: it must be at least 1, which measures in all validations"
            )
        self.name = f"{prefix}{frechet_name(features)}"
        self.features, self.features_weights = features, features_weights
        self.every_n_steps = every_n_steps
        self.reference: Gaussian | None = None  # measured once
        self._network: FrozenNetwork | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate") and self._network is None:
            option = f"{type(self).__name__}: features"
            self._network = FrozenNetwork(load_features(self.features, self.features_weights, option))

    def due(self, trainer: Trainer) -> bool:
        """Whether this validation is to be measured."""
        return not trainer.sanity_checking and trainer.global_step % self.every_n_steps == 0

    def measured(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> features (B, D)."""
        return self._network(images)

    @staticmethod
    def added(statistics: FeatureStatistics | None, features: Tensor) -> FeatureStatistics:
        """Statistics with some more features (B, D), B >= 0; None begins them."""
        if statistics is None:
            statistics = FeatureStatistics(features.shape[1]).to(float64_device(features.device))
        statistics.update(features.to(statistics.device))
        return statistics

    def gathered(self, statistics: FeatureStatistics) -> Gaussian:
        """Of all ranks, on the CPU, where stored statistics are."""
        try:
            mean, covariance, count = statistics.compute()
            return Gaussian(mean.cpu(), covariance.cpu(), count)
        except ValueError as error:
            raise UserError(f"{type(self).__name__}: {error}; validate on more images") from error

    def report(self, trainer: Trainer, samples: Gaussian, protocol: dict[str, Any]) -> float:
        """The distance to the reference; rank 0 writes it down."""
        value = frechet_distance(samples, self.reference)
        if trainer.is_global_zero:
            averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
            facts = {
                "step": trainer.global_step,
                "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
                "ema": averaged,
                "n": samples.count,
            }
            path = Path(trainer.default_root_dir) / "evaluation" / f"{self.name}-{trainer.global_step:07d}.json"
            network = feature_protocol(self.features, self._network.network) | {"dim": len(samples.mean)}
            common = {"features": network, "frechet": FRECHET, "versions": versions()}
            write_figures(path, {self.name: value}, protocol | common | {"samples": facts | protocol["samples"]})
        return value

    def log_distance(self, pl_module: LightningModule, value: float) -> None:
        """Log under `val/`; every rank has the same value."""
        pl_module.log(f"val/{self.name}", torch.tensor(value, dtype=torch.float32), sync_dist=True)
