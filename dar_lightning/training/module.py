"""Base class of TokenizerModule and ARModule: optimizer, seeds, logging, validation over padded batches."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from dar_lightning.errors import UserError
from dar_lightning.formats.pretrained import build_config
from dar_lightning.training.batch_plan import TrainingPlan
from dar_lightning.training.log_step import StepMeans
from dar_lightning.training.optim import OptimizerConfig, configure_adamw


class TrainingModule(LightningModule):
    """Training of one of our models. A subclass has `training_step` and `evaluate_batch(batch, batch_idx, stage)`.

    A training step returns "loss" and, as "parts", the detached scalars that are logged as train/NAME.
    """

    def __init__(self, optimizer: OptimizerConfig):
        super().__init__()
        self.optimizer = optimizer
        self.step_means = StepMeans()

    @property
    def model(self) -> nn.Module:
        """The tokenizer or the AR model."""
        return self.tokenizer if hasattr(self, "tokenizer") else self.ar

    def configure_optimizers(self) -> dict[str, Any]:
        plan = TrainingPlan.of(self.trainer)
        return configure_adamw(self, self.optimizer, plan.steps, plan.steps_per_epoch)

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        seed_batch(self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_batch_end(self, outputs: dict, batch: dict, batch_idx: int) -> None:
        self.step_means.add(self, outputs["parts"])

    def validation_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor] | None:
        return self.evaluate_batch(batch, batch_idx, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.evaluate_batch(batch, batch_idx, "test")

    def log_means(self, means: dict[str, Tensor], count: int, prog_bar: bool = False) -> None:
        """Log means over this rank's `count` rows as means over all rows of all ranks."""
        # a float, since ranks average the weights: integers would be cut
        self.log_dict(means, batch_size=float(count), sync_dist=True, prog_bar=prog_bar)


def choose_config(config: Any, preset: str | None, kind: type) -> Any:
    """The config of this kind that a module is given: itself, the name of a preset, or what checkpoints keep of it."""
    if preset is not None:
        if config != kind():
            raise UserError(f"preset is {preset!r} and config is given too: keep one of them")
        return kind.preset(preset)
    # Checkpoints keep a mapping. In the annotation of `config`, configs would pass unchecked.
    return build_config(kind, config, "config") if isinstance(config, Mapping) else config


def counted_rows(valid: Tensor) -> tuple[Tensor, int]:
    """Rows of a validation batch to measure, (B,) bool, and how many of them count.

    Where all is padding, which a rank may have, its rows are measured with a weight of zero: all ranks must log.
    """
    count = int(valid.sum())
    return (valid if count else ~valid), count


def seed_batch(rank: int, batch: int) -> None:
    """Seed torch's generators for a rank's n-th batch, so that a resumed run draws what the unbroken one would."""
    run = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what `seed_everything` chose
    # One multiplicative hash per part keeps neighbouring ranks, batches and seeds apart.
    torch.manual_seed((run * 0x9E3779B1 + rank * 0x85EBCA77 + batch * 0xC2B2AE3D) % 2**63)
