"""EarlyStopping's patience on resume: the config's, not the checkpoint's."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info


class EarlyStoppingPatience(Callback):
    """Lets EarlyStopping keep the `patience` of this run's config, where its state in a checkpoint holds another.

    `dar fit` always has this callback. The optimizer's options are in `TrainingModule.on_train_start`.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        for callback in trainer.early_stopping_callbacks:
            state = states.get(callback.state_key, {}) if isinstance(callback, EarlyStopping) else {}
            if (was := state.get("patience", callback.patience)) != callback.patience:
                state["patience"] = callback.patience
                rank_zero_info(f"EarlyStopping.patience was {was} in the checkpoint and is {callback.patience} now")
