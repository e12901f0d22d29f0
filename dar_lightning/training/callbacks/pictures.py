"""Where pictures go: to TensorBoard, beside whatever other loggers a run has."""

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


def draws(trainer: Trainer) -> bool:
    """Whether this process writes pictures."""
    return trainer.is_global_zero and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def draw(trainer: Trainer, name: str, image: Tensor) -> None:
    """Log an image, (3, H, W) uint8, at the current step."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, image, trainer.global_step)
