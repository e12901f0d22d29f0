"""Bad samples: skipped, counted over all ranks and logged once; too many stop the run."""

import logging
from collections.abc import Collection, Iterable
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist

from dar_lightning.errors import UserError

log = logging.getLogger(__name__)


class Bad(NamedTuple):
    """A bad sample: its name, "shard/key", and why it cannot be used; both are empty in place of a good one."""

    name: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Skipped:
    """The bad samples of a split: those that this process has met, and those of other ranks since they last compared.

    `option` is what the user calls the split, `total` counts its samples, good or bad.
    """

    def __init__(self, option: str, total: int, max_share: float) -> None:
        self.option, self.total, self.max_share = option, total, max_share
        self._met: dict[str, Bad] = {}  # by its line: one sample may be bad in two ways
        self._unshared: dict[str, Bad] = {}  # those of them that the other ranks do not know of

    @property
    def reasons(self) -> dict[str, str]:
        """ "shard/key" -> why."""
        return dict(self._met.values())

    def add(self, found: Iterable[Bad]) -> None:
        """Take note of bad samples; the log names each once, and those that a shard has lost share a line."""
        new = {line: bad for bad in found if (line := str(bad)) not in self._met}
        self._met |= new
        self._unshared |= new
        for _, lines in groupby(new, lambda line: line.partition("/#")[0]):  # lost ones have a number for a key
            first, *more = lines
            log.warning("%s: skipped %s%s", self.option, first, f", and {len(more)} more like it" if more else "")

    def check(self, everywhere: bool = False) -> None:
        """Raise a UserError if there are too many.

        With `everywhere`, those of all ranks count, which must all call this at the same time; ranks above 0 leave with
        a SystemExit then.
        """
        if everywhere:  # a sample comes to another rank in the next epoch
            ranks: list[dict[str, Bad]] = [{}] * dist.get_world_size()
            dist.all_gather_object(ranks, self._unshared)  # on the device that the group serves
            for found in ranks:
                self._met |= found
            self._unshared = {}
            if len(self._met) > self.max_share * self.total and dist.get_rank() > 0:
                raise SystemExit(0)  # rank 0 says it; Lightning kills it if another one left with an error first
        check_share(self.option, self._met, self.total, self.max_share)


def check_share(option: str, bad: Collection[str], total: int, max_share: float) -> None:
    """Raise a UserError if the bad samples are more than their largest share of the total."""
    if len(bad) > max_share * total:
        raise UserError(
            f"{option}: {len(bad)} of {total} samples cannot be used ({len(bad) / total:.2%}, max_bad_share is "
            f"{max_share:.2%}), the first is {next(iter(bad))}"
        )
