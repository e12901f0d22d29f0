"""Monitor of the AR model's loss and accuracy by token position."""

import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure
from torch import Tensor

from dar_lightning.ar.order import written
from dar_lightning.errors import UserError
from dar_lightning.metrics.binned import BinnedMean
from dar_lightning.training.callbacks.pictures import writers
from dar_lightning.training.log_step import is_log_step, log_bins


class PositionLoss(Callback):
    """Logs loss (nats) and accuracy of tokens by their place in the sequence, over all devices.

    After each validation, two plots over all positions: `loss_by_position` of the validation tokens and of the last
    logged training tokens, and `accuracy_by_position`. As scalars, means over each group of consecutive tokens, k from
    0: `groups/train_loss_k`, since it was last logged, every `trainer.log_every_n_steps` steps, and
    `groups/val_loss_k`, `groups/val_accuracy_k`.

    Under AblationModule, a token's place is the tokenizer's, in whatever order tokens are written. It adds
    `groups/val_entropy_k` (nats, of the predicted distributions), and by the order of writing the plot
    `loss_by_written_position` and `written/val_loss_k`, of the k-th part of the written sequence.

    Args:
        num_groups: groups of tokens, as many as the tokenizer has; a divisor of the number of tokens.
    """

    def __init__(self, num_groups: int = 8):
        self.num_groups = num_groups
        self._last_train: Tensor | None = None  # (N,), what was last logged

    def setup(self, trainer, pl_module, stage) -> None:
        tokens = pl_module.ar.config.num_tokens
        if self.num_groups < 1 or tokens % self.num_groups:
            raise UserError(f"PositionLoss: num_groups is {self.num_groups}: it must divide the {tokens} tokens")
        metrics = (BinnedMean(tokens) for _ in range(5))
        self._train, self._loss, self._hit, self._entropy, self._written = metrics

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        add_tokens(self._train.to(pl_module.device), outputs["token_loss"])
        if is_log_step(trainer):
            self._last_train = self._train.compute().cpu()
            log_bins(pl_module, "groups/train_loss", self._by_group(self._last_train))
            self._train.reset()

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        for mean in (self._loss, self._hit, self._entropy, self._written):
            mean.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is not None:  # not of padding alone
            add_tokens(self._loss, outputs["token_loss"])
            add_tokens(self._hit, outputs["hit"])
            if "entropy" in outputs:
                add_tokens(self._entropy, outputs["entropy"])
                add_tokens(self._written, written(outputs["token_loss"], outputs["order"]))

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        loss, hit = self._loss.compute().cpu(), self._hit.compute().cpu()  # (N,)
        log_bins(pl_module, "groups/val_loss", self._by_group(loss))
        log_bins(pl_module, "groups/val_accuracy", self._by_group(hit))
        entropy, by_writing = self._entropy.compute().cpu(), self._written.compute().cpu()  # NaN without an order
        log_bins(pl_module, "groups/val_entropy", self._by_group(entropy))
        log_bins(pl_module, "written/val_loss", self._by_group(by_writing))
        if trainer.sanity_checking or not writers(trainer):
            return
        curves = {"validation": loss} | ({} if self._last_train is None else {"train": self._last_train})
        plots = {"loss_by_position": curves, "accuracy_by_position": {"validation": hit}}
        if not by_writing.isnan().any():
            plots["loss_by_written_position"] = {"validation": by_writing}
        for name, lines in plots.items():
            axes = (figure := Figure(figsize=(7.2, 3.6), layout="constrained")).subplots()
            for label, values in lines.items():
                axes.plot(values.numpy(), label=label)
            axes.set_xlabel("token")
            axes.grid(axis="y")
            axes.legend()
            for writer in writers(trainer):
                writer.add_figure(name, figure, trainer.global_step)

    def _by_group(self, values: Tensor) -> Tensor:
        """(N,) -> (num_groups,)."""
        return values.view(self.num_groups, -1).mean(dim=1)


def add_tokens(mean: BinnedMean, values: Tensor) -> None:
    """Values of tokens (B, N), by their places."""
    mean.update(torch.arange(values.shape[1], device=values.device).expand_as(values), values)
