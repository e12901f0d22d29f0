"""Randomness annealing (RAR): training on shuffled orders of tokens, fewer and fewer, until the model's own is left."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dar_lightning.ar.model import ARModel
from dar_lightning.errors import require

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
        told = f"config.place_tables is {config.place_tables}: with annealing.end {self.end} it must be"
        require(ar.place_embedding is not None, f"{told} target or own_and_target")
        groups, count = config.order_groups, config.num_tokens
        if self.within == "group":
            require(
                count % groups == 0, f"order_groups is {groups}: annealing within groups needs a divisor of {count}"
            )
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
