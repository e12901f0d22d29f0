"""Exponential moving average of the weights (EMA), from the start weights on, on the training device."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

RECENT = 512  # images of training whose statistics the average has: the fewest batches that hold so many


class Average(AveragedModel):
    """An AveragedModel that begins as a copy of the model and whose update reads nothing back from the device.

    Buffers are the model's, but the statistics of the norms that the model names as `norms_of_average`: mean and
    variance of what the weights of the moment give are not those of what their average gives.
    """

    def __init__(self, model: nn.Module, device: torch.device, decay: float):
        super().__init__(model)  # its counter lies on the CPU
        self.module.to(device)
        self.decay = decay

    def _norms(self) -> list[nn.Module]:
        return getattr(self.module, "norms_of_average", [])

    @torch.no_grad()
    def gather_statistics(self, batches: Iterable[Tensor]) -> None:
        """Give the norms the mean statistics of these batches of images; one that is not finite leaves no trace."""
        whole = [images for images in batches if images.isfinite().all()]
        if whole and self._norms():
            self.module.update_statistics(whole)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters that train; buffers are copied, but statistics."""
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        mine, theirs = zip(*((average, weight) for average, weight in pairs if weight.requires_grad), strict=True)
        # Scaled, then added to, as in the official code. The step is so small that float32 rounds off 3% of it, and
        # the two rounded sums of a lerp are others.
        torch._foreach_mul_(mine, self.decay)
        torch._foreach_add_(mine, theirs, alpha=1.0 - self.decay)
        own = {id(buffer) for norm in self._norms() for buffer in norm.buffers()}
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if id(mine) not in own:
                mine.copy_(theirs)
        self.n_averaged += 1

    def begin_anew(self, model: nn.Module) -> None:
        """Make the average a copy of the model."""
        self._copy("parameters", model)
        self._copy("buffers", model)

    @torch.no_grad()
    def _copy(self, kind: str, model: nn.Module) -> None:
        for mine, theirs in zip(getattr(self.module, kind)(), getattr(model, kind)(), strict=True):
            mine.copy_(theirs)


class EMA(WeightAveraging):
    """Moving average of the parameters: average = decay * average + (1 - decay) * weights after every step.

    It begins with the weights that the run starts from and is not corrected for that, as in the official code.
    Validation, checkpoints and `dar export` use the average. It lies where the model trains and is moved without a
    wait; sharded models (FSDP2) are averaged slice by slice. Lightning's EMAWeightAveraging begins after the first
    step, lies on the CPU if the model is built there, and validates the untrained model until
    `update_starting_at_step`.

    With `latent_norm: batch` the average has statistics of its own ("precise BN", arXiv 2105.07576): before a
    validation, a checkpoint and the end, the latest 512 images of rank 0, of batches that end a step, pass its encoder.
    The weights' own, a moving mean over ten steps, are far behind as long as the weights move. These images stay on all
    ranks' devices and are part of checkpoints (uint8: 6 MB at 64 px, 100 at 256; of larger batches, one batch).

    Args:
        decay: share of the average that stays at a step.
        update_starting_at_step: the first step, from 0, that the average follows. Until then it is the weights
            themselves. None is 0.
    """

    def __init__(self, decay: float = 0.999, update_starting_at_step: int | None = None):
        super().__init__(use_buffers=False)
        self.decay, self.update_starting_at_step = decay, update_starting_at_step or 0
        self.recent: deque[Tensor] = deque()  # batches of images, the same on all ranks
        self._kept_step = 0  # the step of the latest

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            self._average_model = Average(pl_module, trainer.strategy.root_device, self.decay)
            self.recent.clear()

    def on_train_start(self, trainer, pl_module) -> None:
        if not self._average_model.n_averaged:
            self._average_model.begin_anew(pl_module)  # DDP has given all ranks rank 0's weights since setup
        # A checkpoint of Lightning's EMAWeightAveraging does not tell; the step that it stands at is averaged already.
        self._latest_update_step = max(self._latest_update_step, trainer.global_step)
        self._kept_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx: int) -> None:
        # A checkpoint in the middle of a step stands at the last one: its batches are read again.
        if trainer.global_step > self._kept_step and getattr(pl_module, "norms_of_average", []):
            self._keep(batch["image"].clone())
            self._kept_step = trainer.global_step
        if trainer.global_step <= self.update_starting_at_step:
            self._average_model.begin_anew(pl_module)
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _keep(self, images: Tensor) -> None:
        """As the latest of `recent`. All ranks keep those of rank 0: any of them can save a checkpoint alone."""
        if dist.is_initialized():
            dist.broadcast(images, src=0)
        self.recent.append(images)
        while sum(map(len, self.recent)) - len(self.recent[0]) >= RECENT:
            self.recent.popleft()

    def _gather_statistics(self, trainer) -> None:
        if self._average_model is not None:
            device = trainer.strategy.root_device
            with trainer.precision_plugin.forward_context():
                self._average_model.gather_statistics(images.to(device) for images in self.recent)

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._gather_statistics(trainer)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        self._gather_statistics(trainer)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        if trainer.training:  # in a validation, weights are swapped; at its end, the statistics are there
            self._gather_statistics(trainer)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"recent": list(self.recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.recent = deque(state_dict.get("recent", []))  # older checkpoints have none
