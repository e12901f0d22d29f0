"""An average of the weights that stays on the device which trains, and never waits for it."""

from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """An AveragedModel whose update reads nothing back from the device.

    Args:
        model: what is averaged; the first update copies it.
        device: where the average lies.
        decay: share of the average that stays at an update.
    """

    def __init__(self, model: nn.Module, device: torch.device, decay: float):
        super().__init__(model)  # its counter lies on the CPU
        self.module.to(device)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters; buffers are copied."""
        new = 1.0 - self.decay if self.n_averaged else 1.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), new)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.n_averaged += 1


class EMA(EMAWeightAveraging):
    """Lightning's EMAWeightAveraging, of the parameters, for training on a GPU.

    Lightning copies the model while it still lies on the CPU, and leaves the copy there, so that every step brings all
    weights to the host; a copy on the GPU is asked for its counter at every step, and waits. Here the average lies
    where the model trains, and one fused operation moves it. In validation, checkpoints and `dar export` it is used
    as Lightning's. Sharded models (FSDP2) are averaged slice by slice.

    Until its first update the average is the model before training, with which Lightning's would validate and end: as
    long as there is no average, this one leaves the weights in their place, in checkpoints too.

    Args:
        decay: share of the average that stays at a step.
        update_starting_at_step: first step, from 0, after which the average follows the weights.
    """

    def __init__(self, decay: float = 0.999, update_starting_at_step: int | None = None):
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=update_starting_at_step)
        self.decay = decay

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            self._average_model = Average(pl_module, trainer.strategy.root_device, self.decay)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None and not self._average_model.n_averaged:
            checkpoint["state_dict"] = checkpoint["current_model_state"]

    def _swap_models(self, pl_module) -> None:
        if self._average_model.n_averaged:
            super()._swap_models(pl_module)

    def _copy_average_to_current(self, pl_module) -> None:
        if self._average_model.n_averaged:
            super()._copy_average_to_current(pl_module)
