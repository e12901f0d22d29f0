"""Base of the FID callbacks: feature network, statistics summed over ranks, protocol."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dar_lightning.errors import UserError
from dar_lightning.metrics.features import feature_protocol, frechet_name, load_features
from dar_lightning.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from dar_lightning.metrics.frozen import FrozenNetwork
from dar_lightning.metrics.measure import float64_device
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.records.protocol import FRECHET, Protocol, write_metrics
from dar_lightning.records.provenance import provenance
from dar_lightning.weights.lightning import has_average


class MeasuredSet:
    """A set of images of which each rank measures its share: their features, and what identifies their pixels."""

    def __init__(self, network: FrozenNetwork):
        self.network = network
        self.statistics: FeatureStatistics | None = None
        self.digests: dict[int, bytes] = {}

    def add(self, images: Tensor, count: int | None = None, numbers: list[int] | None = None) -> None:
        """Add the first `count` (None: all) of images (B, 3, H, W) uint8, B > 0; numbers: their pixels are noted."""
        features = self.network(images)[:count]
        if self.statistics is None:
            self.statistics = FeatureStatistics(features.shape[1]).to(float64_device(features.device))
        self.statistics.update(features.to(self.statistics.device))
        if numbers is not None:
            digests = image_digests(images.permute(0, 2, 3, 1).cpu().numpy())
            self.digests |= list(zip(numbers, digests, strict=True))[:count]

    def gathered(self) -> Gaussian:
        """Statistics of all ranks' shares, on the CPU, where stored ones are."""
        try:
            mean, covariance, count = self.statistics.compute()
            return Gaussian(mean.cpu(), covariance.cpu(), count)
        except ValueError as error:
            raise UserError(f"Frechet distance: {error}; validate on more images") from error

    def sha256(self, trainer: Trainer) -> str:
        """What identifies the set of all ranks (`records.pixels`)."""
        digests = [self.digests]
        if trainer.world_size > 1:
            digests *= trainer.world_size
            torch.distributed.all_gather_object(digests, self.digests)
        return set_sha256(digest for _, digest in sorted(pair for part in digests for pair in part.items()))


class FrechetCallback(Callback):
    """Logs a Frechet distance in validations, on EMA weights if the run averages them.

    Weights are used after validation batches alone, where the average is in place wherever its callback stands in the
    list. Checkpoints and EMA copies have neither the feature network nor the statistics.

    Each value is also written, with its protocol, to `evaluation/` in the run's folder, as `dar evaluate` writes it. A
    file of `dar validate` replaces none that is there. In training, a file that cannot be written costs a line.

    Args:
        prefix: of the name: "r" gives val/rFID, and val/rFD-<name> with any other network than Inception.
        features: a feature network's name, see `metrics.features.load_features`.
        features_weights: a local file of its weights; None downloads them.
        every_n_steps: measure in the first validation at or after each multiple of so many training steps, whenever the
            run was resumed; `dar validate` always measures.
        label: ends the names in logs and of files, for a second callback of the same class; None for none.
    """

    due = False  # whether the validation at hand is to be measured

    def __init__(
        self, prefix: str, features: str, features_weights: str | None, every_n_steps: int, label: str | None = None
    ):
        if every_n_steps < 1:
            raise UserError(
                f"every_n_steps is {every_n_steps}: it must be at least 1, which measures in all validations"
            )
        if label is not None and not re.fullmatch(r"[\w.-]+", label):
            raise UserError(f"label is {label!r}: it is part of file names, use letters, digits and _ . -")
        self.label = label
        self.metric = f"{prefix}{frechet_name(features)}"  # the name in the file
        self.name = self.labelled(self.metric)
        self.features, self.features_weights = features, features_weights
        self.every_n_steps = every_n_steps
        self.reference: Gaussian | None = None  # measured once
        self._measured_at = 0  # training step of the last measurement
        self._checkpoint_averaged: bool | None = None
        self._network: FrozenNetwork | None = None

    def labelled(self, metric: str) -> str:
        """A metric's name in the logs."""
        return metric if self.label is None else f"{metric}-{self.label}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "validate") and self._network is None:
            option = f"{type(self).__name__}: features"
            self._network = FrozenNetwork(load_features(self.features, self.features_weights, option))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, int]:
        return {"measured_at": self._measured_at}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._measured_at = state_dict["measured_at"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Outside of training, what a checkpoint calls "state_dict" is used.
        self._checkpoint_averaged = has_average(checkpoint)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        passed = trainer.global_step // self.every_n_steps > self._measured_at // self.every_n_steps
        self.due = not trainer.sanity_checking and (passed or not _training(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.due and _training(trainer):
            self._measured_at = trainer.global_step

    def averaged(self, trainer: Trainer) -> bool | None:
        """Whether the weights that are measured are an average over training steps; None where nothing tells."""
        if _training(trainer):
            averages = [found._average_model for found in trainer.callbacks if isinstance(found, WeightAveraging)]
            return any(average.n_averaged > 0 for average in averages)
        return self._checkpoint_averaged

    def report(
        self, trainer: Trainer, samples: Gaussian, protocol: Protocol, others: dict[str, Tensor] | None = None
    ) -> None:
        """Log the samples' distance from the reference, and other metrics of all ranks, and write them with a protocol.

        `protocol` says what they depend on, apart from what all callbacks share.
        """
        # On the device, since NCCL reduces no tensor of the CPU.
        device = trainer.strategy.root_device
        value = frechet_distance(samples, self.reference)
        metrics = {self.metric: torch.tensor(value, dtype=torch.float32, device=device)} | (others or {})
        named = {f"val/{self.labelled(name)}": metric.float() for name, metric in metrics.items()}
        trainer.lightning_module.log_dict(named, sync_dist=True, batch_size=1)
        if not trainer.is_global_zero:
            return
        facts = {
            "step": trainer.global_step if _training(trainer) else None,
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "precision": trainer.precision,
            "n": samples.count,
        }
        network = feature_protocol(self.features, self._network.network) | {"dim": len(samples.mean)}
        protocol = replace(
            protocol,
            samples=facts | protocol.samples,
            methods=protocol.methods | {"features": network, "frechet": FRECHET},
            provenance=provenance(device, trainer.precision),
        )
        numbers = {name: metric.item() if metric.isfinite() else None for name, metric in (others or {}).items()}
        try:
            write_metrics(self._file(trainer), {self.metric: value} | numbers, protocol)
        except UserError as error:
            if not _training(trainer):
                raise
            goes_on = f"val/{self.name} of step {trainer.global_step} is {value:.6g}; training goes on"
            print(f"WARNING: {error}; {goes_on}", file=sys.stderr, flush=True)

    def _file(self, trainer: Trainer) -> Path:
        stem = f"{self.name}-{trainer.global_step:07d}"
        path, number = Path(trainer.default_root_dir) / "evaluation" / f"{stem}.json", 1
        while path.exists() and not _training(trainer):
            number += 1
            path = path.with_name(f"{stem}-{number}.json")
        return path


def _training(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING
