"""Bad samples: they are skipped, counted, named once in the log; and too many of them stop the run, on all ranks."""

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist

from dar_lightning.errors import UserError

log = logging.getLogger(__name__)


class Skipped:
    """The bad samples of a split that this process has met.

    Args:
        option: What the user calls the split.
        total: Samples in it, good or bad.
        max_share: Largest share of it that may be bad.
    """

    def __init__(self, option: str, total: int, max_share: float) -> None:
        self.option, self.total, self.max_share = option, total, max_share
        self._lines: dict[str, None] = {}
        self._met: dict[str, None] = {}  # since the last start()

    @property
    def reasons(self) -> dict[str, str]:
        """ "shard/key" -> why."""
        return dict(line.partition(": ")[::2] for line in self._lines)

    def start(self) -> None:
        """Begin a pass over the data, which is divided among the ranks."""
        self._met = {}

    def add(self, found: Iterable[str]) -> None:
        """Take note of bad samples, each "shard/key: reason".

        The log names each once; those that a shard has lost share a line.
        """
        found = dict.fromkeys(found)
        self._met |= found
        new = [line for line in found if line not in self._lines]
        self._lines |= dict.fromkeys(new)
        for _, lines in groupby(new, lambda line: line.partition("/#")[0]):  # lost ones have a number for a key
            first, *more = lines
            log.warning("%s: skipped %s%s", self.option, first, f", and {len(more)} more like it" if more else "")

    def check(self, everywhere: bool = False) -> None:
        """Refuse to go on if too many were met in this pass.

        Args:
            everywhere: Count those of all ranks, which must all call this at the same time.

        Raises:
            UserError: There are too many.
            SystemExit: The same, with everywhere, on ranks above 0.
        """
        met = list(self._met)
        if everywhere:
            count = torch.tensor(len(met), device="cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(count)
            if int(count) > self.max_share * self.total:
                ranks = [None] * dist.get_world_size()
                dist.all_gather_object(ranks, met)
                met = list(dict.fromkeys(line for rank in ranks for line in rank))
                if dist.get_rank() > 0:
                    raise SystemExit(0)  # rank 0 says it; Lightning kills it if another one left with an error first
        check_share(self.option, met, self.total, self.max_share)


def check_share(option: str, bad: Sequence[str], total: int, max_share: float) -> None:
    """Refuse to go on with too many bad samples.

    Raises:
        UserError: They are more than their largest share of the total.
    """
    if len(bad) > max_share * total:
        raise UserError(
            f"{option}: {len(bad)} of {total} samples cannot be used ({len(bad) / total:.2%}, max_bad_share is "
            f"{max_share:.2%}), the first is {bad[0]}"
        )
