"""AdamW and learning rate schedule: weight decay on matrices only, linear warm-up, linear decay."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dar_lightning.errors import UserError, require


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule: linear warm-up, constant, linear to final_lr.

    Steps are optimizer steps, counted from 0.

    Args:
        lr: peak learning rate.
        betas: AdamW's decay rates.
        weight_decay: on parameters of two or more dimensions; the others get none.
        warmup_steps: W; step s < W has lr * s / W, so that the first one moves no weight and only fills AdamW's
            moments, as in the official code. 0 for none.
        decay_steps: length, in steps, of the linear descent that ends with the last training step; 0 for none.
        decay_epochs: the same in epochs, instead.
        final_lr: learning rate at its end.
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr: float = 0.0
    decay_epochs: float = 0.0

    def __post_init__(self):
        lengths = (self.warmup_steps, self.decay_steps, self.decay_epochs)
        if self.lr <= 0 or min(self.weight_decay, self.final_lr, *lengths) < 0:
            raise UserError(f"optimizer needs a positive lr and no negative value, not {self}")
        both = f"decay_steps {self.decay_steps} and decay_epochs {self.decay_epochs}"
        require(not (self.decay_steps and self.decay_epochs), f"optimizer has {both}: one must be 0")

    def factor(self, step: int, max_steps: int) -> float:
        """Learning rate at a step (from 0), divided by lr; decay_epochs is not read."""
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if not self.decay_steps:
            return warmup
        left = min(max(max_steps - step, 0) / self.decay_steps, 1.0)
        end = self.final_lr / self.lr
        return min(warmup, end + (1.0 - end) * left)


def configure_adamw(
    module: nn.Module, config: OptimizerConfig, max_steps: float, steps_per_epoch: float = math.inf
) -> dict:
    """What LightningModule.configure_optimizers returns: AdamW of the trainable parameters, and its schedule.

    `max_steps` of the whole run is needed where the learning rate descends, `steps_per_epoch` for decay_epochs alone.
    """
    if config.decay_epochs:
        require(not math.isinf(steps_per_epoch), "optimizer decay_epochs needs data with an end: use decay_steps")
        config = replace(config, decay_steps=round(config.decay_epochs * steps_per_epoch), decay_epochs=0.0)
    if config.decay_steps and not 0 < max_steps < math.inf:
        raise UserError("optimizer decay_steps needs an end: set trainer.max_steps or trainer.max_epochs")
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    # A fused AdamW could unscale float16 gradients itself, and Lightning then refuses to clip them in any mixed
    # precision. Without the claim they are unscaled before the clipping, which is what clipping needs.
    optimizer._step_supports_amp_scaling = False
    schedule = LambdaLR(optimizer, lambda step: config.factor(step, max_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def use_options(optimizer: torch.optim.Optimizer, schedule: LambdaLR, config: OptimizerConfig) -> dict[str, tuple]:
    """Give what `configure_adamw` made, after a checkpoint was restored into it, the options of this run.

    A checkpoint brings its own peak learning rate, betas and weight decay along, beside AdamW's moments. Where nothing
    differs, nothing is touched: a resumed run has the bits of an unbroken one.

    Returns:
        Name of each option that differed -> (value in the checkpoint, value now).
    """
    changed = {}
    for group, decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        for name, value in (("betas", tuple(config.betas)), ("weight_decay", decay)):
            was = tuple(group[name]) if name == "betas" else group[name]
            if was != value:
                changed[name], group[name] = (was, value), value
    if (was := schedule.base_lrs) != (now := [config.lr] * len(was)):
        changed["lr"], schedule.base_lrs = (was[0], config.lr), now
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"] = config.lr
            group["lr"] = config.lr * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return changed
