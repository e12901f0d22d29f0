"""TensorBoard logger that survives a full disk, and the TensorBoard writers of a trainer."""

import sys
from functools import partialmethod
from time import monotonic
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from dar_lightning.errors import naming

RETRY_SECONDS = 60.0


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger; when its files cannot be written, a line says so and the run goes on.

    What is logged in the meantime is lost. After a minute a new file is tried, which TensorBoard shows with the others.
    All options are TensorBoardLogger's.
    """

    @property
    def experiment(self) -> Any:
        with naming("trainer.logger", OSError):
            writer = super().experiment
        files = writer.file_writer if rank_zero_only.rank == 0 else None  # None after it was closed, too
        if files is not None and not isinstance(files.event_writer, SurvivingWriter):
            files.event_writer = SurvivingWriter(files.event_writer)
        return writer


class SurvivingWriter:
    """In the place of an EventFileWriter, whose errors come up from its thread at any later call."""

    def __init__(self, writer: EventFileWriter) -> None:
        self.get_logdir = writer.get_logdir
        self._writer: EventFileWriter | None = writer
        self._retry_at = 0.0  # by the monotonic clock

    def _call(self, method: str, *arguments) -> None:
        try:
            if self._writer is None:
                if method != "add_event" or monotonic() < self._retry_at:
                    return
                self._writer = EventFileWriter(self.get_logdir())
            getattr(self._writer, method)(*arguments)
        except OSError as error:
            self._writer, self._retry_at = None, monotonic() + RETRY_SECONDS
            reason = f"cannot write logs to {self.get_logdir()}: {error.strerror}"
            print(f"WARNING: {reason}; nothing is logged for a minute, training goes on", file=sys.stderr, flush=True)

    add_event = partialmethod(_call, "add_event")
    flush = partialmethod(_call, "flush")
    close = partialmethod(_call, "close")


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers of this process: those of rank 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]
