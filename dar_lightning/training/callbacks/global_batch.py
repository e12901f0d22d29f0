"""Global batch size by gradient accumulation, on any number of devices."""

from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dar_lightning.data.loader import StreamDataModule
from dar_lightning.errors import UserError
from dar_lightning.training.batch_plan import TrainingPlan, accumulation
from dar_lightning.training.loggers import writers


class GlobalBatch(Callback):
    """Sets `accumulate_grad_batches` so that a step has the same samples on any number of devices, and says so.

    `dar fit` always has this callback; its size is the option `global_batch`. At the start of training it prints the
    run's plan in one line, which goes to TensorBoard too, as the text "plan". Checkpoints that are written between two
    steps stand at the last one: the batches since then are read again, with the same noise. What batches change beside
    gradients, the running statistics of `latent_norm: batch`, is not undone.

    Args:
        global_batch: samples per optimizer step over all devices; None leaves `accumulate_grad_batches` as it is.
    """

    def __init__(self, global_batch: int | None = None):
        if global_batch is not None and global_batch < 1:
            raise UserError(f"global_batch is {global_batch}: it must be at least 1, or null")
        self.global_batch = global_batch

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            self.derive(trainer, trainer.datamodule)

    def derive(self, trainer: Trainer, datamodule: LightningDataModule | None) -> None:
        """Set the Trainer's accumulate_grad_batches, or say what does not fit it."""
        if self.global_batch is None:
            return
        if not isinstance(datamodule, StreamDataModule):
            raise UserError("global_batch needs a DataModule of dar_lightning: leave it out, or set batch sizes there")
        accumulate = accumulation(self.global_batch, datamodule.batch_size, trainer.world_size)
        if trainer.accumulate_grad_batches not in (1, accumulate):
            given, makes = trainer.accumulate_grad_batches, f"global_batch {self.global_batch} makes it {accumulate}"
            raise UserError(f"trainer.accumulate_grad_batches is {given}: {makes}; leave one of them out")
        trainer.accumulate_grad_batches = accumulate

    def on_train_start(self, trainer, pl_module) -> None:
        plan = f"{TrainingPlan.of(trainer)}; lr {trainer.optimizers[0].defaults['lr']:g}"
        rank_zero_info(plan + (f"; goes on after step {trainer.global_step:,}" if trainer.global_step else ""))
        for writer in writers(trainer):
            writer.add_text("plan", plan, trainer.global_step)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        current = trainer.fit_loop.epoch_loop.batch_progress.current
        accumulated = current.processed % trainer.accumulate_grad_batches
        if current.processed == trainer.num_training_batches:  # an epoch's last batch ends a step in any case
            accumulated = 0
        again = current.ready - current.processed + accumulated  # batches after the last step
        if not again:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counters in (progress["total"], progress["current"]):
            counters.update(dict.fromkeys(counters, counters["ready"] - again))
        progress["is_last_batch"] = False
        if isinstance(trainer.datamodule, StreamDataModule):  # which leaves out the unprocessed batch itself
            checkpoint[type(trainer.datamodule).__qualname__]["stream"]["position"] -= accumulated
