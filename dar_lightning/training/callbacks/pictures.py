"""Logging of image grids to TensorBoard."""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers of this process: those of rank 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def log_picture(trainer: Trainer, name: str, image: Tensor) -> None:
    """Log an image, (3, H, W) uint8, at the current step."""
    for writer in writers(trainer):
        writer.add_image(name, image, trainer.global_step)
