"""Monitors: curves of codebook use, of losses by token group and position, of token influence, gradients and memory.

What each curve tells, and when to worry: docs/monitoring.md.
"""

import resource
import sys
import warnings

import torch
from lightning.pytorch import Callback
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import get_total_norm
from torchmetrics import Metric

from dar_lightning.ar.order import written
from dar_lightning.data.transforms import to_float
from dar_lightning.errors import UserError, require
from dar_lightning.generation.drawing import image_generator
from dar_lightning.metrics.codebook import CodebookUse
from dar_lightning.metrics.reconstruction import token_influence, token_influence_names
from dar_lightning.training.fsdp import whole
from dar_lightning.training.log_step import is_log_step, log_bins, log_numbers
from dar_lightning.training.loggers import writers


class BinnedMean(Metric):
    """Mean of the values that fall into each of a number of bins, over all devices. Updates never wait for a GPU."""

    full_state_update = False

    def __init__(self, bins: int):
        super().__init__()
        self.add_state("sums", torch.zeros(bins), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, values: Tensor, bins: Tensor | None = None) -> None:
        """Add values, in bins (int64) of the same shape; None: values (B, bins), by their place."""
        bins = torch.arange(len(self.sums), device=values.device).expand_as(values) if bins is None else bins
        values = values.detach().float().flatten()
        self.sums.index_add_(0, bins.flatten(), values)
        self.counts.index_add_(0, bins.flatten(), torch.ones_like(values))

    def compute(self) -> Tensor:
        """(bins,) float32; NaN where nothing fell."""
        return self.sums / self.counts

    def pop(self) -> Tensor:
        """What `compute` gives on all ranks, (bins,); then begin anew."""
        with warnings.catch_warnings(action="ignore"):  # of a mean of nothing, which is NaN
            means = self.compute().view(-1)  # torchmetrics makes a scalar of one bin
        self.reset()
        return means


class CodebookMonitor(Callback):
    """Logs how training tokens spread over the codebook, every `trainer.log_every_n_steps` steps.

    `codebook/use` (share of codes that a token chose), `codebook/dead` (number of the others) and `codebook/perplexity`
    (1 to the codebook's size), of all devices' tokens since they were last logged.
    """

    needs = "tokenizer"  # which model

    def setup(self, trainer, pl_module, stage) -> None:
        self._use = CodebookUse(pl_module.tokenizer.config.codebook_size).to(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._use.update(outputs["codes"])
        if is_log_step(trainer):
            use, perplexity = self._use.compute()
            dead = (1 - use) * len(self._use.counts)
            pl_module.log_dict({"codebook/use": use, "codebook/dead": dead, "codebook/perplexity": perplexity})
            self._use.reset()


class GroupLoss(Callback):
    """Logs the flow loss of the images that train each group of tokens, k from 0, over all devices.

    `groups/train_flow_k` (every `trainer.log_every_n_steps` steps, since it was last logged), `groups/val_flow_k`, and
    `groups/val_gain_k`: by how much that loss grows when the group's tokens are those of another image, all others
    staying. The gain is not measured while the codebook is bypassed.

    Args:
        gain_batches: validation batches that the gain is measured on: one decoder pass each.
    """

    needs = "tokenizer"  # which model

    def __init__(self, gain_batches: int = 8):
        self.gain_batches = gain_batches

    def setup(self, trainer, pl_module, stage) -> None:
        groups, device = pl_module.tokenizer.config.num_groups, trainer.strategy.root_device
        self._train, self._val, self._gain = (BinnedMean(groups).to(device) for _ in range(3))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._train.update(outputs["flow_each"], outputs["group"])
        if is_log_step(trainer):
            log_bins(pl_module, "groups/train_flow", self._train.pop())

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is None:  # padding alone
            return
        self._val.update(outputs["flow_each"], outputs["group"])
        tokenizer, codes = pl_module.tokenizer, outputs["codes"]
        if batch_idx >= self.gain_batches or len(codes) < 2 or tokenizer.quantizer.bypass:
            return
        window = tokenizer.schedule.windows(outputs["u"])  # (B, n)
        swapped = codes.scatter(1, window, codes.roll(1, dims=0).gather(1, window))
        with trainer.precision_plugin.val_step_context():
            flow = tokenizer.flow_of_codes(outputs["images"], swapped, outputs["u"], outputs["noise"])
        self._gain.update(flow - outputs["flow_each"], outputs["group"])

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        log_bins(pl_module, "groups/val_flow", self._val.pop())
        log_bins(pl_module, "groups/val_gain", self._gain.pop())


class PositionLoss(Callback):
    """Logs loss (nats) and accuracy of tokens by their place in the sequence, over all devices.

    As plots over all positions, after each validation: `loss_by_position` of the validation tokens and of the last
    logged training tokens, and `accuracy_by_position`. As means over each group of consecutive tokens, k from 0:
    `groups/train_loss_k` (every `trainer.log_every_n_steps` steps, since it was last logged), `groups/val_loss_k` and
    `groups/val_accuracy_k`. Under AblationModule, a token's place is the tokenizer's, in whatever order tokens are
    written; added are `groups/val_entropy_k` (nats, of the predicted distributions), and by the order of writing the
    plot `loss_by_written_position` and `written/val_loss_k`.

    Args:
        num_groups: groups of tokens, as many as the tokenizer has; a divisor of the number of tokens.
    """

    needs = "ar"  # which model

    CURVES = ("groups/train_loss", "groups/val_loss", "groups/val_accuracy", "groups/val_entropy", "written/val_loss")

    def __init__(self, num_groups: int = 8):
        self.num_groups = num_groups
        self._last_train: dict[str, Tensor] = {}  # of shape (N,), what was last logged

    def setup(self, trainer, pl_module, stage) -> None:
        tokens = pl_module.ar.config.num_tokens
        if self.num_groups < 1 or tokens % self.num_groups:
            raise UserError(f"PositionLoss: num_groups is {self.num_groups}: it must divide the {tokens} tokens")
        device = trainer.strategy.root_device
        self._means = {name: BinnedMean(tokens).to(device) for name in self.CURVES}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._means["groups/train_loss"].update(outputs["token_loss"])
        if is_log_step(trainer):
            self._last_train = {"train": self._log(pl_module, "groups/train_loss")}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if outputs is None:  # padding alone
            return
        self._means["groups/val_loss"].update(outputs["token_loss"])
        self._means["groups/val_accuracy"].update(outputs["hit"])
        if "entropy" in outputs:
            self._means["groups/val_entropy"].update(outputs["entropy"])
            self._means["written/val_loss"].update(written(outputs["token_loss"], outputs["order"]))

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        loss, accuracy, _, in_order = (self._log(pl_module, name) for name in self.CURVES[1:])  # (N,) each
        if trainer.sanity_checking or not writers(trainer):
            return
        plots = {"loss_by_position": {"validation": loss} | self._last_train}
        plots |= {
            "accuracy_by_position": {"validation": accuracy},
            "loss_by_written_position": {"validation": in_order},
        }
        for name, lines in plots.items():
            if lines["validation"].isnan().any():  # nothing has an order of its own
                continue
            axes = (figure := Figure(figsize=(7.2, 3.6), layout="constrained")).subplots()
            for label, values in lines.items():
                axes.plot(values.numpy(), label=label)
            axes.set_xlabel("token")
            axes.grid(axis="y")
            axes.legend()
            for writer in writers(trainer):
                writer.add_figure(name, figure, trainer.global_step)

    def _log(self, pl_module, name: str) -> Tensor:
        """Log the means over groups of what was gathered, which is returned and begun anew."""
        values = self._means[name].pop().cpu()  # (N,)
        log_bins(pl_module, name, values.view(self.num_groups, -1).mean(dim=1))
        return values


class TokenInfluence(Callback):
    """In each validation, logs how much tokens decide of the first images: PSNRs in dB, means over all devices' images.

    They are `val/NAME` of `metrics.reconstruction.token_influence_names`, where the other tokens are the next image's.
    Not measured while the codebook is bypassed.

    Args:
        num_images: how many of each device's first validation batch; each is decoded up to five times.
    """

    needs = "tokenizer"  # which model

    def __init__(self, num_images: int = 16):
        require(num_images >= 2, f"TokenInfluence: num_images is {num_images}: another image's tokens need 2 or more")
        self.num_images = num_images

    @torch.no_grad()
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        tokenizer, valid = pl_module.tokenizer, batch["valid"]
        if batch_idx or dataloader_idx or trainer.sanity_checking or tokenizer.quantizer.bypass:
            return
        names = token_influence_names(tokenizer.config.num_groups)
        images, numbers = batch["image"][valid][: self.num_images], batch["index"][valid][: self.num_images]
        psnr = torch.zeros(0, len(names), device=images.device)
        if len(images) > 1:
            generators = [image_generator(0, number) for number in numbers.tolist()]
            with trainer.precision_plugin.val_step_context():
                codes = tokenizer.tokenize(to_float(images))
                psnr = token_influence(tokenizer, images, codes, codes.roll(-1, dims=0), generators)
        # all ranks log, one that measured nothing with a weight of zero
        means = psnr.mean(dim=0).nan_to_num()
        pl_module.log_means({f"val/{name}": mean for name, mean in zip(names, means, strict=True)}, len(psnr))


class OptimizerMonitor(Callback):
    """Logs, every `trainer.log_every_n_steps` steps, learning rate and gradient norms that a step is taken with.

    `optimizer/lr`, and before clipping `optimizer/grad_norm_PART` of each part of the LightningModule (tokenizer, ar,
    adversarial); under DDP of the gradient that all devices share.
    """

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not is_log_step(trainer):
            return
        log_numbers(pl_module, {"optimizer/lr": optimizer.param_groups[0]["lr"]})
        norms = {}
        for name, part in pl_module.named_children():
            if gradients := [p.grad for p in part.parameters() if p.grad is not None]:
                norms[f"optimizer/grad_norm_{name}"] = whole(get_total_norm(gradients))
        pl_module.log_dict(norms)


class Memory(Callback):
    """Logs memory of this process in GiB, every `trainer.log_every_n_steps` steps, without waiting for a GPU.

    `memory/device_peak` is the most that tensors took on the GPU since it was last logged, `memory/host_peak` the most
    of the host's memory that was ever resident, data workers not included.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not is_log_step(trainer):
            return
        unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts in bytes, Linux in KiB
        values = {"memory/host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        if pl_module.device.type == "cuda":
            values["memory/device_peak"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        log_numbers(pl_module, values)
