"""Global batch size, gradient accumulation and number of steps, from the Trainer and the data."""

import math
from bisect import bisect
from dataclasses import dataclass

from lightning.pytorch import Trainer

from dar_lightning.errors import UserError


@dataclass(frozen=True)
class TrainingPlan:
    """The arithmetic of a training run; in one line as str(plan)."""

    batch_size: int | None  # samples per batch and device; None if the loader does not say
    devices: int  # processes, over all machines
    accumulate: int  # batches per optimizer step
    steps_per_epoch: float  # optimizer steps; inf if the data has no end
    steps: float  # optimizer steps of the whole run; inf if it has no end

    @classmethod
    def of(cls, trainer: Trainer) -> "TrainingPlan":
        """The plan of a Trainer that is about to fit, or fits; the training data is set up if it is not."""
        trainer.fit_loop.setup_data()
        batch_size = getattr(trainer.train_dataloader, "batch_size", None)
        accumulate, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        steps_per_epoch = math.ceil(batches / accumulate) if math.isfinite(batches) else math.inf
        steps = trainer.estimated_stepping_batches
        return cls(batch_size, trainer.world_size, accumulate, steps_per_epoch, math.inf if steps == -1 else steps)

    def __str__(self) -> str:
        """Such as "global batch 1024 = 64 x 8 devices x 2 accumulated; 360,000 steps (287.8 epochs of 1,251)"."""
        size = "?" if self.batch_size is None else self.batch_size * self.devices * self.accumulate
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        batch = f"global batch {size} = {self.batch_size or '?'} x {devices} x {self.accumulate} accumulated"
        if math.isinf(self.steps):
            return f"{batch}; no end"
        epochs = f"{self.steps / self.steps_per_epoch:.4g} epochs of {self.steps_per_epoch:,}"
        return f"{batch}; {self.steps:,} steps ({epochs})"


def accumulation(global_batch: int, batch_size: int, devices: int) -> int:
    """Batches per optimizer step that make a global batch.

    Raises:
        UserError: there is no such number; the line names the nearest values that fit.
    """
    if global_batch % devices:
        low = global_batch // devices * devices
        near = f"{low} or {low + devices}" if low else str(devices)
        raise UserError(f"global_batch is {global_batch}: {devices} devices cannot share it evenly; use {near}")
    share = global_batch // devices
    if share % batch_size:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        place = bisect(fitting, batch_size)
        near = " or ".join(map(str, fitting[max(place - 1, 0) : place + 1]))  # the next smaller, the next larger one
        raise UserError(
            f"global_batch is {global_batch}: not a multiple of batch_size {batch_size} x {devices} device(s) = "
            f"{batch_size * devices}; use data.init_args.batch_size {near}"
        )
    return share // batch_size
