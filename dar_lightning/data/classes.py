"""Class names where two data sets meet: labels are numbers, and mean the same only under the same names."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from dar_lightning.errors import UserError, require

HINT = "make both with the same classes (dar shard --classes)"


def check_same_classes(named: Mapping[str, Sequence[str]], hint: str = HINT) -> None:
    """Refuse data sets whose labels mean different classes, or differ in their number.

    Args:
        named: option -> class names in the order of the labels; empty where nobody knows them, which is not compared.
        hint: what would be right, the end of the error line.

    Raises:
        UserError: it names the first class that differs, and both options.
    """
    known = [(option, tuple(names)) for option, names in named.items() if names]
    for option, mine in known[1:]:
        first, theirs = known[0]
        for place, (one, other) in enumerate(zip_longest(mine, theirs, fillvalue="missing")):
            require(one == other, f"{option}: its class {place} is {one}, in {first} that is {other}; {hint}")


def labels_by_name(labels: Tensor, names: Sequence[str], known: Sequence[str], option: str, other: str) -> Tensor:
    """Labels (n,) int64 of one data set as those of another, matched by the names of the classes.

    Args:
        labels: numbers of `names`.
        names: classes of the data set that is `option`.
        known: classes of the data set that is `other`.
        option: for the error line.
        other: for the error line.

    Returns:
        (n,) int64, numbers of `known`; `labels` as they are where one of the two has no names.

    Raises:
        UserError: a class that occurs is none of `known`, or a label is none of `names`.
    """
    if not names or not known:
        return labels
    places = {name: number for number, name in enumerate(known)}
    table = torch.tensor([places.get(name, -1) for name in names])
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise UserError(f"{option}: has labels outside its {len(names)} classes")
    matched = table[labels]
    if (matched < 0).any():
        name = names[int(labels[matched < 0][0])]
        few = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
        raise UserError(f"{option}: its class {name} is none of {other}, which has {few}; give the same classes")
    return matched
