"""Monitor of the tokenizer's flow loss by token group, with own and with other images' tokens."""

import torch
from lightning.pytorch import Callback

from dar_lightning.metrics.binned import BinnedMean
from dar_lightning.training.log_step import is_log_step, log_bins


class GroupLoss(Callback):
    """Logs the flow loss of the images that train each group of tokens, k from 0, over all devices.

    - `groups/train_flow_k`: since it was last logged, every `trainer.log_every_n_steps` steps.
    - `groups/val_flow_k`: of the validation images.
    - `groups/val_gain_k`: by how much that loss grows when the group's tokens are those of another image, all others
      staying. 0: nothing would be lost without the group. Not measured while the codebook is bypassed.

    Args:
        gain_batches: validation batches that the gain is measured on: one decoder pass each.
    """

    def __init__(self, gain_batches: int = 8):
        self.gain_batches = gain_batches

    def setup(self, trainer, pl_module, stage) -> None:
        groups = pl_module.tokenizer.config.num_groups
        self._train, self._val, self._gain = (BinnedMean(groups) for _ in range(3))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._train.to(pl_module.device).update(outputs["group"], outputs["flow_each"])
        if is_log_step(trainer):
            log_bins(pl_module, "groups/train_flow", self._train.compute())
            self._train.reset()

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        for mean in (self._val, self._gain):
            mean.to(pl_module.device).reset()

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is None:  # padding alone
            return
        self._val.update(outputs["group"], outputs["flow_each"])
        tokenizer, codes = pl_module.tokenizer, outputs["codes"]
        if batch_idx >= self.gain_batches or len(codes) < 2 or tokenizer.quantizer.bypass:
            return
        window = tokenizer.schedule.windows(outputs["u"])  # (B, n)
        swapped = codes.scatter(1, window, codes.roll(1, dims=0).gather(1, window))
        with trainer.precision_plugin.val_step_context():
            flow = tokenizer.flow_of_codes(outputs["images"], swapped, outputs["u"], outputs["noise"])
        self._gain.update(outputs["group"], flow - outputs["flow_each"])

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        log_bins(pl_module, "groups/val_flow", self._val.compute())
        log_bins(pl_module, "groups/val_gain", self._gain.compute())
