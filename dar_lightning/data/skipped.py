"""Bad samples: they are skipped, counted, named once in the log; and too many of them stop the run."""

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby

from dar_lightning.errors import UserError

SHOWN = 20  # lines in the log

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
        self.reasons: dict[str, str] = {}  # "shard/key" -> why
        self._lines = 0

    def add(self, found: Iterable[str]) -> None:
        """Take note of bad samples, each "shard/key: reason". What comes at once gets one line a shard in the log.

        Raises:
            UserError: There are too many now.
        """
        pairs = [one.partition(": ")[::2] for one in found]
        new = {name: reason for name, reason in pairs if name not in self.reasons}
        self.reasons |= new
        check_share(self.option, [": ".join(pair) for pair in self.reasons.items()], self.total, self.max_share)
        for shard, names in groupby(new, lambda name: name.partition("/")[0]):
            first, *more = names
            self._warn(f"skipped {first}: {new[first]}" + (f", and {len(more)} more of {shard}" if more else ""))

    def _warn(self, line: str) -> None:
        self._lines += 1
        if self._lines <= SHOWN:
            log.warning("%s: %s", self.option, line)
        elif self._lines == SHOWN + 1:
            log.warning("%s: skipped more than %d samples, from now on they are only counted", self.option, SHOWN)


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
