"""Skipping of steps whose loss or gradient is NaN or infinite, with a limit in a row."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from dar_lightning.errors import UserError, require
from dar_lightning.training.fsdp import own_slice
from dar_lightning.training.late_reading import LateReading


class SkipBadSteps(Callback):
    """Leaves the model and the optimizer as they were in a step whose loss or gradients are not finite on any rank.

    Buffers, such as the running statistics of `latent_norm: batch`, become again what they were before the step. The
    data, the count of steps, the learning rate and the moving average go on. With gradient accumulation, one bad batch
    costs the whole step. Logs `train/skipped_steps`, the number since the start of training.

    The decision is made on the device and never waited for: a fused AdamW skips its update where its `found_inf` is 1,
    as PyTorch's gradient scaler uses it. On a GPU the host reads the count one step late, so a run ends after
    `max_in_a_row` bad steps or one more. With `precision: 16-mixed`, gradients that overflow although the loss is
    finite are the gradient scaler's business, and count as no bad step.

    Args:
        max_in_a_row: so many bad steps one after the other end the run.
    """

    def __init__(self, max_in_a_row: int = 10) -> None:
        require(max_in_a_row >= 1, f"max_in_a_row: {max_in_a_row} steps in a row cannot be skipped, give at least 1")
        self.max_in_a_row = max_in_a_row
        self.counts = torch.zeros(2)  # skipped since the start, and in a row until now

    def on_train_start(self, trainer, pl_module) -> None:
        for optimizer in trainer.optimizers:
            if not optimizer.defaults.get("fused"):
                raise UserError(f"SkipBadSteps needs an optimizer with fused=True, not {type(optimizer).__name__}")
            if trainer.scaler and getattr(optimizer, "_step_supports_amp_scaling", False):
                # The gradient scaler would put its own found_inf in the place of this callback's.
                needs = "needs an optimizer whose _step_supports_amp_scaling is False, as configure_adamw makes it"
                raise UserError(f"SkipBadSteps with precision {trainer.precision} {needs}")
        self.counts = self.counts.to(pl_module.device)
        self._steps_done = trainer.global_step
        self._buffers: list[Tensor] | None = None  # before the first batch of the step at hand
        self._late = LateReading()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._buffers is None:
            self._buffers = [buffer.clone() for buffer in pl_module.buffers()]
            self._bad_loss = torch.zeros((), dtype=torch.bool, device=pl_module.device)  # of any batch of this step

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self._bad_loss = self._bad_loss | ~loss.detach().isfinite()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [own for p in parameters if (own := own_slice(p.grad)).numel()]
        bad = self._bad_loss | ~torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()
        counted = self._bad_loss if trainer.scaler else bad
        flags = torch.stack([bad, counted]).float()  # what to skip, and what to count
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        optimizer.found_inf, counted = flags
        for buffer, before in zip(pl_module.buffers(), self._buffers, strict=True):
            buffer.copy_(torch.where(optimizer.found_inf > 0, before, buffer))
        self.counts = torch.stack([self.counts[0] + counted, (self.counts[1] + 1) * counted])
        self._buffers = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self._steps_done:  # gradients were only accumulated
            return
        self._steps_done = trainer.global_step
        pl_module.log("train/skipped_steps", self.counts[0])
        _, in_a_row = map(int, self._late.exchange(self.counts) or (0, 0))
        if in_a_row >= self.max_in_a_row:
            raise UserError(
                f"stopped at step {trainer.global_step}: loss or gradients were NaN or infinite in {in_a_row} steps in "
                "a row, and these were skipped; look at the data and the learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts = state_dict["counts"]
