"""When loggers write: monitors gather on the device at every batch, and wait for the device only then."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def is_log_step(trainer: Trainer) -> bool:
    """Whether this training batch ends an optimizer step that loggers write (`trainer.log_every_n_steps`)."""
    return trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate()


def log_bins(module: LightningModule, name: str, values: Tensor) -> None:
    """Log values (bins,) as name_0, name_1 and so on, without those that are NaN, which had nothing to measure."""
    # Flat, for torchmetrics makes a scalar of one bin. On the CPU, for Lightning puts Python's numbers on the GPU and
    # waits for them there.
    values = values.flatten().cpu()
    module.log_dict({f"{name}_{i}": value for i, value in enumerate(values) if not value.isnan()})
