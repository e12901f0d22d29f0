"""Exponential moving average of the weights (EMA), from the start weights on, on the training device."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Average(AveragedModel):
    """An AveragedModel that begins as a copy of the model and whose update reads nothing back from the device.

    Buffers are the model's, but the statistics of the norms that the model names as `norms_of_average`: mean and
    variance of what the weights of the moment give are not those of what their average gives. These see the training's
    batches through the average itself, with a memory of 100 steps.
    """

    def __init__(self, model: nn.Module, device: torch.device, decay: float):
        super().__init__(model)  # its counter lies on the CPU
        self.module.to(device)
        self.decay = decay
        for norm in self._norms():
            norm.momentum = 0.01

    def _norms(self) -> list[nn.Module]:
        return getattr(self.module, "norms_of_average", [])

    @torch.no_grad()
    def update_statistics(self, batch: Any) -> None:
        """Let the norms see a batch; all ranks have what rank 0 saw, and what is not finite leaves no trace."""
        buffers = [buffer for norm in self._norms() for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        if buffers:
            self.module.update_statistics(batch)
        for now, old in zip(buffers, before, strict=True):
            now.copy_(torch.where(now.isfinite(), now, old))
            if dist.is_initialized():
                dist.broadcast(now, src=0)

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
    wait; sharded models (FSDP2) are averaged slice by slice. With `latent_norm: batch` each step has one more pass of
    the encoder, never compiled, for the average's own statistics. Lightning's EMAWeightAveraging begins after the first
    step, lies on the CPU if the model is built there, and validates the untrained model until
    `update_starting_at_step`.

    Args:
        decay: share of the average that stays at a step.
        update_starting_at_step: the first step, from 0, that the average follows. Until then it is the weights
            themselves. None is 0.
    """

    def __init__(self, decay: float = 0.999, update_starting_at_step: int | None = None):
        super().__init__(use_buffers=False)
        self.decay, self.update_starting_at_step = decay, update_starting_at_step or 0

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            self._average_model = Average(pl_module, trainer.strategy.root_device, self.decay)

    def on_train_start(self, trainer, pl_module) -> None:
        if not self._average_model.n_averaged:
            self._average_model.begin_anew(pl_module)  # DDP has given all ranks rank 0's weights since setup
        # A checkpoint of Lightning's EMAWeightAveraging does not tell; the step that it stands at is averaged already.
        self._latest_update_step = max(self._latest_update_step, trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step <= self.update_starting_at_step:
            self._average_model.begin_anew(pl_module)
            return
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._latest_update_step > before:
            with trainer.precision_plugin.forward_context():
                self._average_model.update_statistics(batch)
