"""Is training waiting for its data?"""

from time import perf_counter

import torch
from lightning.pytorch import Callback

from dar_lightning.errors import UserError


class DataSpeed(Callback):
    """Logs the speed of training and how much of it is lost to waiting, every `trainer.log_every_n_steps` steps.

    - `data/images_per_second`: images that all devices together have trained on.
    - `data/wait_share`: part of the time in which the training process stood still because the next batch was not
      there; also in the progress bar. Near 0 is right; much above it, give the loader more workers.
    - `data/skipped`: distinct bad samples that all ranks had met when they last compared (see `stream.Loader`), and
      this one since; if the DataModule counts them.

    All are of the time since they were last logged, without validation. Nothing here waits for a GPU. The wait is what
    the loader measures (`stream.Loader.waited`), not the time between two training steps: in there, progress bars and
    loggers wait for the GPU, and checkpoints are written.
    """

    def __init__(self):
        self._start = self._batch_end = self._waited = 0.0  # seconds
        self._images = self._steps = 0

    def on_train_start(self, trainer, pl_module) -> None:
        if not hasattr(trainer.train_dataloader, "waited"):
            raise UserError(
                "DataSpeed: the training loader does not measure its waiting; use a DataModule of dar_lightning"
            )
        self._steps = trainer.global_step
        self._begin(trainer, perf_counter())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch["label"])
        self._batch_end = now = perf_counter()
        ends_step = trainer.global_step > self._steps  # the others' gradients are only accumulated
        self._steps = trainer.global_step
        if not ends_step or not trainer.log_every_n_steps or self._steps % trainer.log_every_n_steps:
            return
        seconds = now - self._start
        values = {"data/images_per_second": self._images * trainer.world_size / seconds}
        if hasattr(trainer.datamodule, "skipped"):
            values["data/skipped"] = sum(len(bad) for bad in trainer.datamodule.skipped.values())
        # Tensors of the CPU, because Lightning puts numbers on the GPU and waits for them there.
        pl_module.log_dict({name: torch.tensor(float(value)) for name, value in values.items()})
        share = torch.tensor((trainer.train_dataloader.waited - self._waited) / seconds)
        pl_module.log("data/wait_share", share, prog_bar=True)
        self._begin(trainer, now)

    def on_validation_end(self, trainer, pl_module) -> None:
        self._start += perf_counter() - self._batch_end

    def _begin(self, trainer, now: float) -> None:
        self._start = self._batch_end = now
        self._images, self._waited = 0, trainer.train_dataloader.waited
