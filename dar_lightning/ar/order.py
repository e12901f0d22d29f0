"""Orders in which a model writes an image's tokens: permutations, and their inverse."""

from typing import Literal

import torch
from torch import Tensor

OrderName = Literal["coarse_to_fine", "reversed", "random", "interleaved", "random_per_sample"]
ORDERS: tuple[str, ...] = OrderName.__args__


def fixed_order(name: str, num_tokens: int, num_groups: int, seed: int) -> Tensor:
    """Place, in the tokenizer's sequence, of the token that is written i-th: (num_tokens,) int64.

    Args:
        name: "coarse_to_fine", the tokenizer's own; "reversed"; "random", one permutation drawn from `seed`; or
            "interleaved": the first token of every group, then the second of every group, and so on.
        num_tokens: how many.
        num_groups: groups that "interleaved" goes over; it divides num_tokens.
        seed: of "random".
    """
    places = torch.arange(num_tokens, device="cpu")
    if name == "reversed":
        return places.flip(0)
    if name == "random":
        return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed), device="cpu")
    return places.view(num_groups, -1).T.flatten() if name == "interleaved" else places


def written(values: Tensor, order: Tensor) -> Tensor:
    """Values by place, in the order they are written: values (B, N), order (B, N) -> (B, N)."""
    return values.gather(1, order)


def placed(values: Tensor, order: Tensor) -> Tensor:
    """The inverse of `written`: the i-th value goes to its place."""
    return torch.empty_like(values).scatter_(1, order, values)
