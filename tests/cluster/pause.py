"""A callback that holds a run at some steps, until a signal reaches it or it is killed."""

import time
from pathlib import Path

from lightning.pytorch import Callback

from dar_lightning.training.callbacks import StopOnSignal


class Pause(Callback):
    """The n-th start of a run waits at the n-th of these steps, and says so in a file n.RANK."""

    def __init__(self, folder: str, steps: list[int]):
        self.folder, self.steps = Path(folder), steps

    def on_train_start(self, trainer, pl_module):
        self.folder.mkdir(exist_ok=True)
        self.start = len(list(self.folder.glob(f"*.{trainer.global_rank}")))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.steps[self.start : self.start + 1] != [trainer.global_step]:
            return
        (self.folder / f"{self.start}.{trainer.global_rank}").touch()
        (stop,) = [callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal)]
        while not stop._signal:
            time.sleep(0.02)
