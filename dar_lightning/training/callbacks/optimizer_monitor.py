"""Monitor of learning rate and gradient norm."""

from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from dar_lightning.training.log_step import is_log_step, log_numbers


class OptimizerMonitor(Callback):
    """Logs, every `trainer.log_every_n_steps` steps, what the step is about to be taken with.

    - `optimizer/lr`: learning rate.
    - `optimizer/grad_norm_PART`: length of the gradient of a part of the LightningModule (tokenizer, ar, adversarial),
      before clipping; under DDP of the gradient that all devices share.
    """

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not is_log_step(trainer):
            return
        log_numbers(pl_module, {"optimizer/lr": optimizer.param_groups[0]["lr"]})
        norms = {}
        for name, part in pl_module.named_children():
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            if gradients:
                norm = get_total_norm(gradients)
                # Sharded gradients (FSDP2) give a norm of which each device holds a part.
                norms[f"optimizer/grad_norm_{name}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        pl_module.log_dict(norms)
