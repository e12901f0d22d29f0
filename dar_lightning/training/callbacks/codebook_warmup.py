"""Codebook warm-up against collapse: unquantized steps, k-means initialization, revival of dead codes."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dar_lightning.errors import UserError, require
from dar_lightning.tokenizer.quantizers import VectorQuantizer


class CodebookWarmup(Callback):
    """Trains without quantization first, then starts the codebook from k-means and replaces codes that stay unused.

    The official recipe needs none of this in its 210K steps. In runs of a few thousand, a random codebook collapses to
    a few codes before the encoder has anything to say.

    A step is an optimizer step with all its batches, of all devices. A moved code is a new one: the moving average
    takes it as it is, and the optimizer's moments of it begin at zero. AdamW's count of steps goes on, so its first
    step is (1 - beta1) / sqrt(1 - beta2) learning rates an entry: 0.45 with our betas, 3.2 with a beta2 of 0.999.

    Args:
        warmup_steps: training steps without quantization; the codebook then becomes the centres of the latents of
            the last `collect_steps` of them.
        collect_steps: steps whose latents k-means sees.
        kmeans_iterations: Lloyd iterations.
        revive_every: after this many steps, codes that no token chose since the last time are moved onto random
            latents of the current batch; 0 never does.
        revive_until: step after which codes are left alone, so that the end of training is undisturbed.
    """

    needs = "tokenizer"  # which model

    def __init__(
        self,
        warmup_steps: int,
        collect_steps: int = 40,
        kmeans_iterations: int = 10,
        revive_every: int = 0,
        revive_until: int = 0,
    ):
        if not 1 <= collect_steps <= warmup_steps:
            raise UserError(f"collect_steps is {collect_steps}: it must be from 1 to warmup_steps, {warmup_steps}")
        self.warmup_steps, self.collect_steps = warmup_steps, collect_steps
        self.kmeans_iterations = kmeans_iterations
        self.revive_every, self.revive_until = revive_every, revive_until
        # Both are of all ranks, so that the checkpoint, which rank 0 writes, holds them. What is new is of the step at
        # hand, for a checkpoint between two steps stands at the last one.
        self.latents, self._new_latents = [], []  # (tokens, codebook_dim) each
        self.counts, self._new_counts = 0, 0  # (codebook_size,), uses since the last revival; 0 for none
        self._steps_done = 0

    def setup(self, trainer, pl_module, stage) -> None:
        name, quantizer = pl_module.tokenizer.config.quantizer, pl_module.tokenizer.quantizer
        if not isinstance(quantizer, VectorQuantizer):
            raise UserError(f"CodebookWarmup: quantizer is {name!r}, and it moves the codes of vq alone; leave it out")
        if pl_module.freeze_encoder:
            raise UserError("CodebookWarmup moves codes, which freeze_encoder keeps; leave the callback out")

    def on_train_start(self, trainer, pl_module) -> None:
        self._steps_done = trainer.global_step
        pl_module.tokenizer.quantizer.bypass = trainer.global_step < self.warmup_steps
        if 0 <= trainer.max_steps <= self.warmup_steps:
            rank_zero_info(
                f"CodebookWarmup: max_steps is {trainer.max_steps}, but the codebook starts after step "
                f"{self.warmup_steps}: until then it is random, and tokens mean nothing"
            )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        ends_step = trainer.global_step > self._steps_done  # the others' gradients are only accumulated
        self._steps_done = trainer.global_step
        step = trainer.global_step if ends_step else trainer.global_step + 1
        reviving = self.revive_every and self.warmup_steps < step <= self.revive_until
        if self.warmup_steps - self.collect_steps < step <= self.warmup_steps:
            self._new_latents.append(self._gather(pl_module, outputs["latents"]).cpu())
        if reviving:
            codes = outputs["codes"][outputs["latents"].isfinite().all(dim=-1)]  # of a step that is skipped, some NaN
            counts = torch.bincount(codes, minlength=len(pl_module.tokenizer.quantizer.codebook))
            self._new_counts = self._new_counts + trainer.strategy.reduce(counts, reduce_op="sum").cpu()
        if not ends_step:
            return
        self.latents, self._new_latents = self.latents + self._new_latents, []
        self.counts, self._new_counts = self.counts + self._new_counts, 0
        if step == self.warmup_steps:
            self._start_codebook(trainer, pl_module, step)
        elif reviving and (step - self.warmup_steps) % self.revive_every == 0:
            self._revive(trainer, pl_module, self._gather(pl_module, outputs["latents"]), step)

    def _start_codebook(self, trainer, pl_module, step: int) -> None:
        latents, quantizer = torch.cat(self.latents).to(pl_module.device), pl_module.tokenizer.quantizer
        said = f"CodebookWarmup: the {self.collect_steps} steps up to step {step} gave no latent that is finite"
        need = "look at the data and the learning rate, or raise collect_steps"
        require(len(latents) > 0, f"{said}, so the codebook cannot start; {need}")
        size, seeded = len(quantizer.codebook), torch.Generator().manual_seed(step)
        codes = spherical_kmeans(latents, size, self.kmeans_iterations, seeded)
        self._move(trainer, pl_module, torch.arange(size), codes)
        quantizer.bypass, self.latents = False, []

    def _revive(self, trainer, pl_module, latents: Tensor, step: int) -> None:
        dead = (self.counts == 0).nonzero().flatten()
        chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(step))[: len(dead)]
        self._move(trainer, pl_module, dead[: len(chosen)], latents[chosen.to(latents.device)])
        pl_module.log("train/revived_codes", float(len(chosen)))
        self.counts = 0

    @staticmethod
    def _move(trainer, pl_module, rows: Tensor, codes: Tensor) -> None:
        """Put codes (n, codebook_dim) into rows (n,) of the codebook; rank 0's, for sums on a GPU round differently."""
        codes = trainer.strategy.broadcast(codes.cpu())
        codebook = pl_module.tokenizer.quantizer.codebook
        averages = [found._average_model.module for found in trainer.callbacks if isinstance(found, WeightAveraging)]
        for target in (codebook, *(average.tokenizer.quantizer.codebook for average in averages)):
            target.data[rows.to(target.device)] = codes.to(target)
        for optimizer in trainer.optimizers:
            for moment in optimizer.state.get(codebook, {}).values():
                if moment.shape == codebook.shape:  # not the count of steps
                    moment[rows.to(moment.device)] = 0.0

    @staticmethod
    def _gather(pl_module, latents: Tensor) -> Tensor:
        """Latents (B, N, d) of all ranks as (tokens, d), without what a step that SkipBadSteps skips has made NaN."""
        gathered = pl_module.all_gather(latents).flatten(0, -2)
        return gathered[gathered.isfinite().all(dim=-1)]

    def state_dict(self) -> dict[str, Any]:
        return {"latents": self.latents, "counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.latents, counts = state_dict["latents"], state_dict["counts"]
        self.counts = 0 if counts is None else counts  # as it was written at first


def spherical_kmeans(points: Tensor, clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Centres of unit vectors by Lloyd's iterations on the sphere: (n, d) -> (clusters, d), of unit length.

    Centres that lose all their points restart on random points. With fewer points than clusters, points repeat.
    """

    def random_points(count: int) -> Tensor:
        return points[torch.randint(len(points), (count,), generator=generator).to(points.device)]

    order = torch.randperm(len(points), generator=generator)[:clusters].to(points.device)
    centres = torch.cat([points[order], random_points(clusters - len(order))])
    for _ in range(iterations):
        nearest = torch.cat([(rows @ centres.T).argmax(dim=-1) for rows in points.split(4096)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=clusters) == 0
        sums[empty] = random_points(int(empty.sum()))
        centres = F.normalize(sums, dim=-1)
    return centres
