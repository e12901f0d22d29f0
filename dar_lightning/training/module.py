"""Base class of both LightningModules: optimizer, seeds, logging, start weights, validation over padded batches."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dar_lightning.ar import decode_step
from dar_lightning.errors import require
from dar_lightning.formats.pretrained import build_config
from dar_lightning.layers import compile_blocks, recompile_limit
from dar_lightning.tokenizer import diffusion_step
from dar_lightning.training.batch_plan import TrainingPlan
from dar_lightning.training.log_step import is_log_step
from dar_lightning.training.optim import OptimizerConfig, configure_adamw, use_options

VARIANTS = 64  # of a compiled block's code, by shapes, grad mode and cache; a run needs about ten


class TrainingModule(LightningModule):
    """Training of one of our models. A subclass has `training_step` and `evaluate_batch(batch, batch_idx, stage)`.

    A training step returns "loss" and, as "parts", the detached scalars that are logged as train/NAME.
    """

    def __init__(self, optimizer: OptimizerConfig):
        super().__init__()
        self.optimizer = optimizer
        self._schedule: LambdaLR | None = None  # that configure_optimizers made
        self._sums: dict[str, Tensor] = {}  # of the losses of a step's batches

    @property
    def model(self) -> nn.Module:
        """The tokenizer or the AR model."""
        return self.tokenizer if hasattr(self, "tokenizer") else self.ar

    def compile_parts(self, *parts: nn.Module) -> None:
        """Compile the blocks of modules with a list `blocks`, in place; no setting of torch cuts or drops a graph."""
        keep_graphs_whole()
        compile_blocks(*parts)

    def configure_optimizers(self) -> dict[str, Any]:
        plan = TrainingPlan.of(self.trainer)
        made = configure_adamw(self, self.optimizer, plan.steps, plan.steps_per_epoch)
        self._schedule = made["lr_scheduler"]["scheduler"]
        return made

    def on_fit_start(self) -> None:
        """Compiled blocks stay whole in this thread, too, which may not be the one that built the model."""
        if any(part._compiled_call_impl is not None for part in self.modules()):
            keep_graphs_whole()

    def on_train_start(self) -> None:
        """Train with the optimizer's options of this run, not with the checkpoint's, and say which were others."""
        schedules = [each.scheduler for each in self.trainer.lr_scheduler_configs]
        if schedules != [self._schedule]:  # a subclass has others
            return
        changed = use_options(self.trainer.optimizers[0], self._schedule, self.optimizer)
        for name, (was, now) in changed.items():
            step = f"from step {self.trainer.global_step:,} on"
            rank_zero_info(f"optimizer.{name} was {was} in the checkpoint and is {now} {step}")

    def on_validation_end(self) -> None:
        """Free the idle decoding steps that callbacks' drawings have kept, since training needs the memory."""
        decode_step.steps.forget()
        diffusion_step.steps.forget()

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        seed_batch(self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_batch_end(self, outputs: dict, batch: dict, batch_idx: int) -> None:
        """Log a step's losses as means over its accumulated batches and all ranks.

        Lightning's own `log` keeps the last batch of a step; its `sync_dist` reduces every value of every batch. Here
        the batches are added up on the device, and the ranks meet once in a step that loggers write.
        """
        trainer, parts = self.trainer, outputs["parts"]
        place = (trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches
        before = self._sums if place else {}
        self._sums = {name: value.float() + before.get(name, 0.0) for name, value in parts.items()}
        if is_log_step(trainer):
            means = torch.stack(list(self._sums.values())) / ((place + 1) * trainer.world_size)
            if trainer.world_size > 1:
                dist.all_reduce(means)
            self.log_dict({f"train/{name}": mean for name, mean in zip(self._sums, means, strict=True)})

    def validation_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor] | None:
        return self.evaluate_batch(batch, batch_idx, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.evaluate_batch(batch, batch_idx, "test")

    def log_means(self, means: dict[str, Tensor], count: int, prog_bar: bool = False) -> None:
        """Log means over this rank's `count` rows as means over all rows of all ranks."""
        # a float, since ranks average the weights: integers would be cut
        self.log_dict(means, batch_size=float(count), sync_dist=True, prog_bar=prog_bar)


def keep_graphs_whole() -> None:
    """Change two settings of dynamo, which from torch 2.15 on belong to a thread: call this in the one that trains.

    DDP's optimizer would cut a block where a bucket of gradients is full, for the overlap that separate blocks have
    anyway (`optimize_ddp`). And the blocks of encoder and conditioner share code of which training, validation, small
    batches and streaming need variants: after 8, torch compiles no more.
    """
    settings, limit = torch._dynamo.config, recompile_limit()
    settings.optimize_ddp = False
    setattr(settings, limit, max(getattr(settings, limit), VARIANTS))


def choose_config(config: Any, preset: str | None, kind: type) -> Any:
    """The config of this kind that a module is given: itself, the name of a preset, or what checkpoints keep of it."""
    if preset is not None:
        require(config == kind(), f"preset is {preset!r} and config is given too: keep one of them")
        return kind.preset(preset)
    # Checkpoints keep a mapping. In the annotation of `config`, configs would pass unchecked.
    return build_config(kind, config, "config") if isinstance(config, Mapping) else config


def init_from_pretrained(module: nn.Module, path_or_repo: str) -> Any:
    """Copy a saved model's weights into one of its class where name and shape agree, and list the others.

    `path_or_repo` is a folder of save_pretrained or a Hub repository. Returns the saved model's config.
    """
    saved = type(module).from_pretrained(path_or_repo)
    source, target = saved.state_dict(), module.state_dict()
    fitting = {name: source[name] for name in target if name in source and source[name].shape == target[name].shape}
    require(fitting, f"init_from {path_or_repo}: no tensor there fits this config")
    fresh = module.load_state_dict(fitting, strict=False).missing_keys
    rank_zero_info(f"init_from {path_or_repo}: loaded {len(fitting)} of {len(target)} tensors")
    for title, names in (("start fresh", fresh), ("were not used", [name for name in source if name not in fitting])):
        if names:
            rank_zero_info(f"init_from {path_or_repo}: {len(names)} {title}: {', '.join(names)}")
    return saved.config


def counted_rows(valid: Tensor) -> tuple[Tensor, int]:
    """Rows of a validation batch to measure, (B,) bool, and how many of them count.

    Where all is padding, which a rank may have, its rows are measured with a weight of zero: all ranks must log.
    """
    count = int(valid.sum())
    return (valid if count else ~valid), count


def seed_batch(rank: int, batch: int) -> None:
    """Seed torch's generators for a rank's n-th batch, so that a resumed run draws what the unbroken one would."""
    run = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what `seed_everything` chose
    # One multiplicative hash per part keeps neighbouring ranks, batches and seeds apart.
    torch.manual_seed((run * 0x9E3779B1 + rank * 0x85EBCA77 + batch * 0xC2B2AE3D) % 2**63)
