"""Logging of training curves without waiting for the GPU."""

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def is_log_step(trainer: Trainer) -> bool:
    """Whether this training batch ends an optimizer step that loggers write (`trainer.log_every_n_steps`).

    Monitors gather on the device at every batch, and wait for the device only then.
    """
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def log_numbers(module: LightningModule, values: Mapping[str, float], **options) -> None:
    """Log numbers as tensors of the CPU, because Lightning puts numbers on the GPU and waits for them there."""
    module.log_dict({name: torch.tensor(float(value)) for name, value in values.items()}, **options)


def log_bins(module: LightningModule, name: str, values: Tensor) -> None:
    """Log values (bins,) as name_0, name_1 and so on, without those that are NaN, which had nothing to measure."""
    values = values.flatten().cpu()  # flat, for torchmetrics makes a scalar of one bin
    module.log_dict({f"{name}_{i}": value for i, value in enumerate(values) if not value.isnan()})
