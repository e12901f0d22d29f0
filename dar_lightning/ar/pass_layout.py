"""Layout of models that predict several tokens a pass: which token each place reads, and which places it sees.

The first w tokens are predicted one by one, the others in blocks of m, each token without knowledge of the others of
its block (PAR, arXiv 2412.15119, without tokens of its own). Place p = 0..N - 1 predicts token p. It reads token p - 1
(p < w) or p - m, or where there is none, what the condition ends with. That the latter is one and the same for all of
the first block is why the model has a learned vector for each target place besides.
"""

import torch
from torch import Tensor

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.order import IN_GROUPS
from dar_lightning.errors import require


def read_by(config: ARConfig) -> Tensor:
    """The token that each place reads, negative for what the condition ends with: (N,) int64."""
    places = torch.arange(config.num_tokens, device="cpu")
    return places - torch.where(places < config.sequential_tokens, 1, config.tokens_per_pass)


def last_seen(config: ARConfig, before: int) -> Tensor:
    """The last place that each place attends to, its block's last: (before + N,) int64.

    Args:
        config: of a model with "full" attention in a block.
        before: places before the first that predicts a token; they see none after themselves.
    """
    size, start = config.tokens_per_pass, before + config.sequential_tokens
    places = torch.arange(before + config.num_tokens, device="cpu")
    return torch.where(places < start, places, start + size * ((places - start) // size + 1) - 1)


def pass_end(config: ARConfig, written: int) -> int:
    """How many tokens there are after the pass that follows the first `written` ones, which end a pass."""
    return written + (1 if written < config.sequential_tokens else config.tokens_per_pass)


def check_groups(config: ARConfig, size: int) -> None:
    """UserError unless groups of the config's order lie within the tokenizer's groups, of `size` tokens each."""
    mine = config.num_tokens // config.order_groups
    within = f"a group of the order has {mine} tokens, one of the tokenizer {size}: whole ones must fit into it"
    require(size % mine == 0, f"order_groups is {config.order_groups}: {within}")


def check_prefix(config: ARConfig, length: int) -> None:
    """UserError unless the first `length` tokens of the tokenizer's order may be given to a model of this config.

    They are what it writes first, and they end a pass.
    """
    order, size, alone = config.order, config.tokens_per_pass, config.sequential_tokens
    said = f"prefix: {length} tokens are kept"
    if order in IN_GROUPS:
        group = config.num_tokens // config.order_groups
        require(length % group == 0, f"{said}, this model's order is {order}: need a multiple of {group}, whole groups")
        return
    ordered = order == "coarse_to_fine" or not length
    require(ordered, f"prefix: this model's order is {order}, which does not write the first tokens first")
    first = f"up to {alone}, or " if alone else ""
    rest = f"{alone} and a multiple of {size}" if alone else f"a multiple of {size}"
    ends = length <= alone or (length - alone) % size == 0
    require(ends, f"{said}, this model predicts {size} a pass: need {first}{rest}")
