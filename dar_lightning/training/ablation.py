"""AblationModule: AR training with other token orders, annealed shuffled ones, or on the first tokens alone."""

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from dar_lightning.ar.model import ARModel
from dar_lightning.ar.order import IN_GROUPS, ORDERS, written
from dar_lightning.ar.pass_layout import check_groups
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import UserError, require
from dar_lightning.training.ar import ARModule

Within = Literal["image", "group"]


@dataclass(frozen=True)
class Annealing:
    """Which share of training samples is written in an order of its own, by the training step (arXiv 2411.00776).

    The share is 1 before step `start`, falls linearly to 0 at step `end`, and stays there. 0 and 0, the default, is
    never; `start` at the run's last step is always. Steps are optimizer steps, counted from 0.

    Args:
        start: the last step with a share of 1. RAR's is half of all steps.
        end: the first step with a share of 0, at least `start`. RAR's is three quarters of all steps.
        within: "image", a uniform permutation of all tokens; "group", the model's own order with each of
            `config.order_groups` groups permuted, which keeps the sense of the order: groups are steps of denoising.
    """

    start: int = 0
    end: int = 0
    within: Within = "image"

    def __post_init__(self):
        start, end, names = self.start, self.end, Within.__args__
        require(0 <= start <= end, f"annealing.start is {start}, annealing.end is {end}: need 0 <= start <= end")
        require(self.within in names, f"annealing.within is {self.within!r}: choose from {', '.join(names)}")

    def share(self, step: int) -> float:
        """Probability that a sample of this step is shuffled."""
        if step < self.start:
            return 1.0
        return 1 - (step - self.start) / (self.end - self.start) if step < self.end else 0.0

    def check(self, ar: ARModel) -> None:
        """Refuse a model that cannot be told where its tokens belong, or has no groups to shuffle in."""
        if not self.end:
            return
        config, tables = ar.config, ar.tables()
        require("order" in tables, f"annealing.end is {self.end}: config.order {config.order} is shuffled already")
        if ar.place_embedding is None:
            raise UserError(
                f"config.place_tables is {config.place_tables}: with annealing.end {self.end} it must be target or "
                "own_and_target"
            )
        groups, count = config.order_groups, config.num_tokens
        if self.within == "group":
            need = f"annealing within groups needs a divisor of {count}"
            require(count % groups == 0, f"order_groups is {groups}: {need}")
            parts = tables["order"].view(groups, -1) // (count // groups)  # groups of the tokens as they are written
            whole = (parts == parts[:, :1]).all()
            require(whole, f"annealing.within is group: order {config.order} does not write group after group")

    def draw(self, ar: ARModel, batch: int, step: int) -> Tensor:
        """Orders (batch, N) of a step's samples, shuffled or the model's; random by torch's global generator."""
        order, share = ar.draw_order(batch), self.share(step)
        if not share:  # no random number either: the rest of the run is that of a model that never was shuffled
            return order
        groups = ar.config.order_groups if self.within == "group" else 1
        parts = order.view(batch, groups, -1)
        moved = parts.gather(2, torch.rand(parts.shape, device=order.device).argsort(dim=2)).flatten(1)
        return torch.where(torch.rand(batch, 1, device=order.device) < share, moved, order)


class AblationModule(ARModule):
    """ARModule that writes tokens in the order `config.order`, or only the first `config.num_tokens` of the data's.

    What it learns is exported, sampled and measured like any AR model: tokens return to their places before they are
    decoded, and the first tokens alone give the preview after their groups. Sizes are config alone.

    It brings a PositionLoss with `config.order_groups` groups: loss, accuracy and entropy of each group of tokens
    (wherever its tokens are written) and the loss by the place in the written sequence. Losses of different orders are
    comparable: their sum over an image's tokens is a bound on the same joint entropy. For the Frechet distance of an
    order, add a GenerationFID.

    With `annealing`, a falling share of the training samples is written in shuffled orders.
    Validation, sampling and export are in the order `config.order`. train/shuffled is the share.

    Args:
        annealing: from which step to which the share falls, and what is shuffled; nothing by default.
        args: those of ARModule.
        kwargs: those of ARModule.
    """

    orders = ORDERS

    def __init__(self, *args, annealing: Annealing = Annealing(), **kwargs):
        super().__init__(*args, **kwargs)
        annealing.check(self.ar)
        self.annealing = annealing

    def check_num_tokens(self, data: CodesDataModule) -> None:
        mine, theirs, groups = self.ar.config.num_tokens, data.num_tokens, self.ar.config.order_groups
        require(mine <= theirs, f"num_tokens is {mine} in the config: the data has {theirs} per image")
        grouped = self.ar.config.order in IN_GROUPS or (self.annealing.end and self.annealing.within == "group")
        if grouped and data.num_groups is not None:
            check_groups(self.ar.config, theirs // data.num_groups)
        if mine < theirs and data.num_groups is not None and groups * theirs != data.num_groups * mine:
            raise UserError(
                f"order_groups is {groups} in the config: num_tokens {mine} must be that many groups of the "
                f"{theirs // data.num_groups} tokens that a group of the data has"
            )

    def configure_callbacks(self) -> list[Callback]:
        # not at the top: callbacks import the modules
        from dar_lightning.training.callbacks import PositionLoss

        return [PositionLoss(self.ar.config.order_groups)]

    def arrange(self, codes: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        if self.training and self.annealing.end:
            order = self.annealing.draw(self.ar, len(codes), self.global_step)
        else:
            order = self.ar.draw_order(len(codes), generator)
        return written(codes, order), order

    def training_step(self, batch: dict, batch_idx: int) -> dict:
        outputs = super().training_step(batch, batch_idx)
        if self.annealing.end:
            share = self.annealing.share(self.global_step)
            outputs["parts"]["shuffled"] = torch.full((), share, device=self.device)
        return outputs
