"""Random access to the samples of shards, by their number."""

import os
from collections import OrderedDict
from collections.abc import Collection
from typing import BinaryIO

import numpy as np

from dar_lightning.data.decode import BadSample
from dar_lightning.data.shards import IMAGE_TYPES, INDEX, Shard, ShardIndex
from dar_lightning.data.tar import Contents, read_headers
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256


class ShardReader:
    """Random access to the samples of a `ShardIndex`, by their number in the order of the shards.

    Offsets are read from a shard's tar headers when it is first touched, and the last few shards stay open. Copies
    in worker processes open their own files.
    """

    def __init__(self, index: ShardIndex, max_open: int = 64) -> None:
        self.index = index
        self.ends = np.cumsum([shard.samples for shard in index.shards])  # (shards,)
        self.max_open = max_open
        self._open: OrderedDict[int, tuple[BinaryIO | None, Contents]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, number: int, only: Collection[str] | None = None) -> tuple[str, str, dict[str, bytes]]:
        """Shard name, key, and the contents of (`only` some) members by lower-case extension; a BadSample if lost."""
        shard, position, file, contents = self._locate(number)
        if flaw := contents.flaw(position):
            raise BadSample(flaw)
        key, places, _ = contents.samples[position]
        try:
            # pread keeps no file position: safe where threads, or forks, share the descriptor
            members = {
                extension: os.pread(file.fileno(), size, offset)
                for extension, (offset, size) in places.items()
                if only is None or extension in only
            }
        except OSError as error:
            raise BadSample(f"it cannot be read ({error.strerror})") from error
        return shard.name, key, members

    __getitem__ = read

    def name(self, number: int) -> str:
        """What a log calls a sample, good or bad: "shard/key"."""
        shard, position, _, contents = self._locate(number)
        return f"{shard.name}/{contents.name(position)}"

    def _locate(self, number: int) -> tuple[Shard, int, BinaryIO | None, Contents]:
        """A sample's shard, its number in there, and what that shard holds."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = int(np.searchsorted(self.ends, number, side="right"))
        shard = self.index.shards[which]
        if which not in self._open:
            self._open[which] = self._read_shard(shard)
            if len(self._open) > self.max_open and (oldest := self._open.popitem(last=False)[1][0]):
                oldest.close()
        self._open.move_to_end(which)
        return shard, number - int(self.ends[which]) + shard.samples, *self._open[which]

    def _read_shard(self, shard: Shard) -> tuple[BinaryIO | None, Contents]:
        try:
            path = self.index.path(shard)
        except BadSample as bad:
            return None, Contents([], str(bad))
        samples, damage = read_headers(path)
        if any(not sample.flaw for sample in samples[shard.samples :]):
            if shard.sha256 in (None, file_sha256(path)):
                raise UserError(f"{path} holds {len(samples)} samples, its {INDEX} says {shard.samples}; rebuild it")
            # a damaged name has made two samples of one: these go last, the good ones keep a number
            samples.sort(
                key=lambda sample: (
                    bool(sample.flaw) or "cls" not in sample.members or sample.members.keys().isdisjoint(IMAGE_TYPES)
                )
            )
        return path.open("rb", buffering=0) if samples else None, Contents(samples, damage)
