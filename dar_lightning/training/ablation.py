"""AblationModule: AR training with other token orders, annealed shuffled ones, or on the first tokens alone."""

import torch
from lightning.pytorch import Callback
from torch import Tensor

from dar_lightning.ar.order import IN_GROUPS, ORDERS, written
from dar_lightning.ar.pass_layout import check_groups
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import UserError, require
from dar_lightning.training.annealing import Annealing
from dar_lightning.training.ar import ARModule


class AblationModule(ARModule):
    """ARModule that writes tokens in the order `config.order`, or only the first `config.num_tokens` of the data's.

    What it learns is exported, sampled and measured like any AR model: tokens return to their places before they are
    decoded, and the first tokens alone give the preview after their groups. Sizes are config alone.

    It brings a PositionLoss with `config.order_groups` groups: loss, accuracy and entropy of each group of tokens
    (wherever its tokens are written) and the loss by the place in the written sequence. Losses of different orders are
    comparable: their sum over an image's tokens is a bound on the same joint entropy. For the Frechet distance of an
    order, add a GenerationFID.

    With `annealing`, a falling share of the training samples is written in shuffled orders (`training.annealing`).
    Validation, sampling and export are in the order `config.order`. train/shuffled is the share.

    Args:
        annealing: from which step to which the share falls, and what is shuffled; nothing by default.
        args: those of ARModule.
        kwargs: those of ARModule.
    """

    orders = ORDERS

    def __init__(self, *args, annealing: Annealing = Annealing(), **kwargs):  # noqa: B008  (frozen)
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
