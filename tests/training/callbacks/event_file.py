"""TensorBoard's event files, read back; and a Trainer that writes one."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar under a run's folder: name -> step -> value."""
    events = EventAccumulator(str(folder / "logs")).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def trainer(folder: Path, callbacks: list[Callback], **options) -> Trainer:
    """A quiet Trainer on the CPU whose curves go to folder/logs."""
    return Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(str(folder), name="", version="logs"),
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **options,
    )
