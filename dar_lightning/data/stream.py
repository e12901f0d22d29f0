"""The order of the data: which samples are in batch number p, on which rank, whatever happened before.

Nothing here has a state that grows. The order of epoch e is a function of (seed, e), and everything random about a
sample is a function of (seed, epoch, sample), so one integer, the number of batches taken, says where a run stands.
Hence the batches do not depend on the number of workers, resuming needs no replay, and two devices with half the batch
size see the same global batches as one.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dar_lightning.data.skipped import Bad, Skipped
from dar_lightning.errors import UserError

CHECK = 50  # batches between two comparisons of the ranks' bad samples; fewer at the start
KILLED = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)")
NO_MEMORY = re.compile(r"by signal: (Killed|Bus error)")  # a fault or an exit has another cause


class Ticket(NamedTuple):
    """What a sampler hands to a dataset: a sample's number, the epoch (for its crop), and False where it only pads."""

    index: int
    epoch: int = 0
    valid: bool = True


def order_generator(seed: int, epoch: int) -> np.random.Generator:
    """What the order of an epoch is drawn from."""
    return np.random.default_rng([0, seed, epoch])


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """What everything random about a sample in an epoch is drawn from."""
    return np.random.default_rng([1, seed, epoch, index])


def replacement_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """What the samples are drawn from that take a bad one's place in an epoch."""
    return np.random.default_rng([2, seed, epoch, index])


def shuffled(sizes: list[int], seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of one epoch: blocks (shards) shuffled, then samples shuffled within windows of that many blocks.

    Shuffling in windows keeps reads local: at most `window` shards are in use at a time.

    Args:
        sizes: Samples per block.
        seed: Seed of the run.
        epoch: Epoch; every one has an order of its own.
        window: Blocks per window.

    Returns:
        (sum(sizes),) int64, a permutation.
    """
    generator = order_generator(seed, epoch)
    starts = np.cumsum([0, *sizes])
    blocks = [np.arange(starts[b], starts[b + 1]) for b in generator.permutation(len(sizes))]
    windows = [np.concatenate(blocks[i : i + window]) for i in range(0, len(blocks), window)]
    return np.concatenate([generator.permutation(samples) for samples in windows])


class TrainSampler(DistributedSampler):
    """Tickets for one rank, from batch number `position` onwards, one epoch's worth at a time.

    Global batch g of an epoch is the g-th run of `batch_size * num_replicas` samples in that epoch's order, cut evenly
    over the ranks. The remainder is dropped, also that of `accumulate` batches, which are one optimizer step: so steps
    hold the same samples however they are divided. It is a DistributedSampler so that Lightning leaves it in place;
    the epoch comes from `position`, and `set_epoch` has no effect.

    Args:
        dataset: For its length.
        order: Epoch -> permutation of the dataset.
        batch_size: Samples per batch and rank.
        num_replicas: Number of ranks.
        rank: This one.
        accumulate: Batches per optimizer step.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Callable[[int], np.ndarray],
        batch_size: int,
        num_replicas: int,
        rank: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, drop_last=True)
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
            for index in order[start : start + self.batch_size]:
                yield Ticket(int(index), epoch)


class EvalSampler(DistributedSampler):
    """Every sample once over all ranks, in order; ranks that would run short repeat the last one with `valid=False`."""

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[Ticket]:
        size = len(self.dataset)
        for index in range(self.rank, self.num_replicas * len(self), self.num_replicas):
            yield Ticket(min(index, size - 1), valid=index < size)


class Loader(DataLoader):
    """A DataLoader that takes note of the bad samples in its batches, in the dataset's `skipped`.

    Ranks compare theirs after 1, 2, 4, ... batches, then every CHECK of them, and at the end of a pass, so that they
    stop together; what a limited pass leaves is for the DataModule's `teardown`. Workers' user errors arrive as the one
    line that they are, not as a traceback.
    """

    given = 0  # batches, in all passes
    waited = 0.0  # seconds in which whoever iterates stood still for the next batch, so far

    def __iter__(self) -> Iterator[Any]:
        skipped: Skipped | None = getattr(self.dataset, "skipped", None)
        # with these, every rank has as many batches as this one
        together = (
            isinstance(self.sampler, (TrainSampler, EvalSampler)) and dist.is_available() and dist.is_initialized()
        )
        try:
            for number, batch in enumerate(self._timed(super().__iter__()), start=1):
                self.given += 1
                if skipped is not None:
                    skipped.add(bad for bad in map(Bad, *batch.pop("skipped")) if bad.reason)
                    often = self.given < CHECK and self.given.bit_count() == 1  # a power of two
                    if not together or often or self.given % CHECK == 0 or number == len(self):
                        skipped.check(everywhere=together)
                yield batch
            return
        except UserError as error:
            message = str(error).strip().rpartition("UserError: ")[2]
            error.__traceback__ = None  # its frames hold the workers, too
        except RuntimeError as error:
            if not KILLED.search(str(error)):
                raise
            of_memory = NO_MEMORY.search(f"{error} {error.__cause__}")
            hint = f"is there enough memory for {self.num_workers}?" if of_memory else "num_workers=0 may show why"
            message = f"num_workers: {' '.join(str(error).split())}; {hint}"
            error.__traceback__ = None
        self._iterator = None  # so the workers end at once
        raise UserError(message)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = perf_counter()
            batch = next(batches, None)
            self.waited += perf_counter() - start
            if batch is None:
                return
            yield batch


class TrainLoader(Loader):
    """Counts the batches that it has given out, and starts anywhere.

    `len()` is that of a full epoch. An iteration starts at `position` and gives one epoch's worth, so a run that was
    stopped in mid-epoch, or is limited to a part of each epoch, goes on with the next batch.
    """

    sampler: TrainSampler
    unfinished: Callable[[], int] = staticmethod(lambda: 0)  # batches given out that the training has not done with

    @property
    def position(self) -> int:
        """Number of batches given out since the start of the run."""
        return self.sampler.position

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the run stands, and what must be the same for this to mean anything."""
        return {
            "position": self.position - self.unfinished(),
            "global_batch": self.sampler.global_batch,
            "accumulate": self.sampler.accumulate,
            "samples": len(self.sampler.dataset),
            "fingerprint": self.sampler.dataset.fingerprint,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: The global batch or the data are not those of the checkpoint.
        """
        mine = self.state_dict()
        for name, what in (
            ("global_batch", "batch size x devices"),
            ("accumulate", "number of batches per optimizer step"),
            ("samples", "number of training samples"),
            ("fingerprint", "fingerprint of the training data (shards' names, contents and classes)"),
        ):
            if state.get(name, mine[name]) != mine[name]:
                raise UserError(
                    f"cannot resume: {what} was {state[name]} in the checkpoint and is {mine[name]} now; use the same, "
                    "or start a new run from its weights"
                )
        self.sampler.position = state["position"]


def obey_only_the_run(worker: int) -> None:
    """A cluster and a Ctrl+C signal all processes of a run: its workers go on until the run has done its last step.

    What the run itself sends ends a worker at once, as ever.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_run, daemon=True).start()


def _wait_for_the_run() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class StreamDataModule(L.LightningDataModule):
    """What all DataModules share: the two kinds of loader, and the place in the data inside of checkpoints.

    Args:
        batch_size: Samples per batch and device.
        num_workers: Worker processes per loader; the batches do not depend on it.
        seed: Order of the samples, and crops.
    """

    fixed: tuple[str, ...] = ("seed",)  # options that a resumed run must share

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is not a number of samples, give at least 1")
        if num_workers < 0:
            raise UserError(f"num_workers: {num_workers} is negative, give 0 or more")
        if seed < 0:
            raise UserError(f"seed: {seed} is negative, give 0 or more")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._loader: TrainLoader | None = None
        self._restored: dict[str, int] | None = None

    def setup(self, stage: str) -> None:
        """Called by the Trainer at the start of everything that it does: training begins anew, or is restored."""
        if stage == "fit":
            self._loader = None

    def _train_loader(self, dataset: Dataset, order: Callable[[int], np.ndarray]) -> Loader:
        world, rank, overfit, accumulate = 1, 0, 0, 1
        if self.trainer is not None:
            world, rank, overfit = self.trainer.world_size, self.trainer.global_rank, self.trainer.overfit_batches
            accumulate = self.trainer.accumulate_grad_batches
        if overfit:  # the same few batches in every epoch
            return Loader(dataset, batch_size=self.batch_size, drop_last=True, **self._worker_options())
        sampler = TrainSampler(dataset, order, self.batch_size, world, rank, accumulate)
        if sampler.batches == 0:
            times = f", {accumulate} times," if accumulate > 1 else ""
            raise UserError(
                f"batch_size: {self.batch_size} on {world} device(s){times} is more than the {len(dataset)} training "
                "samples"
            )
        before = self._loader
        self._loader = TrainLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=True,
            **self._worker_options(persistent=True),
        )
        if self.trainer is not None:
            # a checkpoint written in the middle of a step (on an exception or a signal) repeats that step
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            self._loader.unfinished = lambda: progress.ready - progress.processed
        if self._restored is not None:
            self._loader.load_state_dict(self._restored)
            self._restored = None
        elif before is not None:  # Trainer(reload_dataloaders_every_n_epochs=...)
            self._loader.sampler.position = before.position
        return self._loader

    def _eval_loader(self, dataset: Dataset) -> Loader:
        trainer = self.trainer
        sampler = None  # in order; Lightning then knows that nothing is shuffled
        if trainer is not None and trainer.world_size > 1:
            sampler = EvalSampler(dataset, trainer.world_size, trainer.global_rank)
        return Loader(dataset, batch_size=self.batch_size, sampler=sampler, **self._worker_options())

    def _worker_options(self, persistent: bool = False) -> dict[str, Any]:
        workers = self.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": persistent and workers > 0,
            "worker_init_fn": obey_only_the_run,
            "pin_memory": torch.cuda.is_available(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Lightning keeps this in every checkpoint."""
        stream = self._loader.state_dict() if self._loader is not None else self._restored
        return {"stream": stream, **{name: getattr(self, name) for name in self.fixed}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; called before a loader has given out its first batch.

        Raises:
            UserError: The data would not be those of the unbroken run.
        """
        training = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        for name in self.fixed if training else ():
            if (was := state_dict.get(name, now := getattr(self, name))) != now:
                raise UserError(
                    f"cannot resume: data.{name} was {was} in the checkpoint and is {now} now; use the same, or start "
                    "a new run from its weights"
                )
        self._restored = state_dict["stream"]
        if self._loader is not None and self._restored is not None:  # sharded models are restored after the loaders
            self._loader.load_state_dict(self._restored)
            self._restored = None
