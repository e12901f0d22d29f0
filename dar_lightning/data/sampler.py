"""Sampler with a seeded, resumable order: which samples are in batch p on which rank.

The order of epoch e is a function of (seed, e), and everything random about a sample is one of (seed, epoch, sample): a
single integer, the number of batches taken, says where a run stands. Hence the batches do not depend on the number of
workers, resuming replays nothing, and two devices with half the batch size see the same global batches as one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler


class Ticket(NamedTuple):
    """What a sampler hands to a dataset: a sample's number, the epoch (for its crop), and False where it only pads."""

    index: int
    epoch: int = 0
    valid: bool = True


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """What everything random about a sample in an epoch is drawn from."""
    return np.random.default_rng([1, seed, epoch, index])


def shuffled(sizes: list[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of one epoch: blocks (shards) shuffled, then samples shuffled within windows of that many blocks.

    Shuffling in windows keeps reads local: at most `window` shards are in use at a time. `sizes` are the samples per
    block.

    Returns:
        (sum(sizes),) int64, a permutation.
    """
    generator = np.random.default_rng([0, seed, epoch])
    blocks = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    blocks = [blocks[number] for number in generator.permutation(len(sizes))]
    windows = [np.concatenate(blocks[i : i + window]) for i in range(0, len(blocks), window)]
    return np.concatenate([generator.permutation(samples) for samples in windows])


class TrainSampler(DistributedSampler):
    """Tickets for one rank, from batch number `position` onwards, one epoch's worth at a time.

    Global batch g of an epoch is the g-th run of `batch_size * num_replicas` samples in that epoch's order, cut evenly
    over the ranks. The remainder is dropped, also that of `accumulate` batches, which are one optimizer step: so steps
    hold the same samples however they are divided. It is a DistributedSampler so that Lightning leaves it in place;
    the epoch comes from `position`, and `set_epoch` has no effect.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Callable[[int], np.ndarray],  # epoch -> permutation of the dataset
        batch_size: int,  # per rank
        num_replicas: int,
        rank: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas, rank)
        self.order, self.batch_size, self.accumulate = order, batch_size, accumulate
        self.global_batch = batch_size * num_replicas
        self.batches = len(dataset) // (self.global_batch * accumulate) * accumulate
        self.position = 0

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[Ticket]:
        last = None
        for position in range(self.position, self.position + self.batches):
            epoch, batch = divmod(position, self.batches)
            if epoch != last:
                order, last = self.order(epoch), epoch
            start = batch * self.global_batch + self.rank * self.batch_size
            yield from (Ticket(int(index), epoch) for index in order[start : start + self.batch_size])


class EvalSampler(DistributedSampler):
    """Every sample once over all ranks, in order; ranks that would run short repeat the last one with `valid=False`."""

    def __iter__(self) -> Iterator[Ticket]:
        size = len(self.dataset)
        for index in range(self.rank, self.num_replicas * len(self), self.num_replicas):
            yield Ticket(min(index, size - 1), valid=index < size)
