"""AblationModule: AR training with other token orders, or on the first tokens alone."""

import torch
from lightning.pytorch import Callback
from torch import Tensor

from dar_lightning.ar.order import ORDERS, written
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import UserError
from dar_lightning.training.ar import ARModule


class AblationModule(ARModule):
    """ARModule that writes tokens in the order `config.order`, or only the first `config.num_tokens` of the data's.

    What it learns is exported, sampled and measured like any AR model: tokens return to their places before they are
    decoded, and the first tokens alone give the preview after their groups. Sizes are config alone.

    It brings a PositionLoss with `config.order_groups` groups: loss, accuracy and entropy of each group of tokens
    (wherever its tokens are written) and the loss by the place in the written sequence. Losses of different orders are
    comparable: their sum over an image's tokens is a bound on the same joint entropy. For the Frechet distance of an
    order, add a GenerationFID.

    Args: those of ARModule.
    """

    orders = ORDERS

    def check_num_tokens(self, data: CodesDataModule) -> None:
        mine, theirs = self.ar.config.num_tokens, data.num_tokens
        if mine > theirs:
            raise UserError(f"num_tokens is {mine} in the config: the data has {theirs} per image")
        groups = self.ar.config.order_groups
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
        order = self.ar.draw_order(len(codes), generator)
        return written(codes, order), order
