"""Checkpoints whose newest one is the end of the run."""

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class LastStepCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint whose `last.ckpt` always holds the last step of a run that came to its end.

    Lightning's leaves it at the last multiple of `every_n_train_steps`. The state of the last step is written before
    EMAWeightAveraging replaces the weights by their average, so a run with a larger `max_steps` goes on from it. All
    options are ModelCheckpoint's, and its checkpoints are read.

    Args:
        save_last: as ModelCheckpoint's, on by default.
        **options: ModelCheckpoint's other options.
    """

    def __init__(self, save_last: bool | None = True, **options: Any):
        super().__init__(save_last=save_last, **options)

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps:
            self._save_last_step(trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.fit_loop.done:  # by max_epochs, max_time or early stopping
            self._save_last_step(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        if not trainer.fast_dev_run:  # which Lightning's forgets to ask
            super().on_train_end(trainer, pl_module)

    def _save_last_step(self, trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
