"""Logging of training curves: when loggers write, means over steps and ranks, without waiting for the GPU."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
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


class StepMeans:
    """Logs training losses as means over the accumulated batches of an optimizer step and over all ranks.

    Lightning's own `log` keeps the last batch of a step; its `sync_dist` reduces every value of every batch. Here the
    batches are added up on the device, and the ranks meet once in a step that loggers write.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = 0

    def add(self, module: LightningModule, values: dict[str, Tensor]) -> None:
        """Add the scalars of a batch, at its end; the module logs them as train/NAME. All ranks have the same names."""
        trainer = module.trainer
        if (trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches == 0:
            self._sums, self._batches = {}, 0  # a step begins
        self._sums = {name: value.detach().float() + self._sums.get(name, 0.0) for name, value in values.items()}
        self._batches += 1
        if not is_log_step(trainer):
            return
        means = torch.stack(list(self._sums.values())) / (self._batches * trainer.world_size)
        if trainer.world_size > 1:
            dist.all_reduce(means)
        module.log_dict({f"train/{name}": mean for name, mean in zip(self._sums, means, strict=True)})
