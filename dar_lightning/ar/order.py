"""Orders in which a model writes an image's tokens: permutations, and their inverse."""

from typing import Literal

import torch
from torch import Tensor

OrderName = Literal[
    "coarse_to_fine",
    "reversed",
    "random",
    "interleaved",
    "random_per_sample",
    "strided_in_group",
    "random_in_group",
]
ORDERS: tuple[str, ...] = OrderName.__args__
PER_SAMPLE = ("random_per_sample", "random_in_group")  # drawn for each sample
IN_GROUPS = ("strided_in_group", "random_in_group")  # all tokens of a group before those of the next one


def fixed_order(
    name: str, num_tokens: int, num_groups: int, seed: int, tokens_per_pass: int = 1, sequential_tokens: int = 0
) -> Tensor:
    """Place, in the tokenizer's sequence, of the token that is written i-th: (num_tokens,) int64.

    Args:
        name: one of ORDERS. "interleaved" is the first token of every group, then the second of every group, and so on;
            in "strided_in_group" the tokens of one pass lie as far from each other within a group as can be.
        num_tokens: how many.
        num_groups: groups that "interleaved" and "strided_in_group" go over; it divides num_tokens.
        seed: of "random".
        tokens_per_pass: m of "strided_in_group": n tokens of a group are written as 0, n/m, 2 n/m, ..., 1, n/m + 1, ...
        sequential_tokens: the first tokens, which "strided_in_group" leaves as they are.
    """
    places = torch.arange(num_tokens, device="cpu")
    if name == "reversed":
        return places.flip(0)
    if name == "random":
        return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed), device="cpu")
    if name == "strided_in_group":
        parts = []
        for group in places.split(num_tokens // num_groups):
            alone = min(max(sequential_tokens - int(group[0]), 0), len(group))
            rest = len(group) - alone
            parts += [group[:alone], group[alone:].view(tokens_per_pass, rest // tokens_per_pass).T.flatten()]
        return torch.cat(parts)
    return places.view(num_groups, -1).T.flatten() if name == "interleaved" else places


def written(values: Tensor, order: Tensor) -> Tensor:
    """Values by place, in the order they are written: values (B, N), order (B, N) -> (B, N)."""
    return values.gather(1, order)


def placed(values: Tensor, order: Tensor) -> Tensor:
    """The inverse of `written`: the i-th value goes to its place."""
    return torch.empty_like(values).scatter_(1, order, values)
