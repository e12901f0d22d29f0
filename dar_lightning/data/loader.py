"""DataLoaders with a resumable position, and the base class of both DataModules."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from dar_lightning.data import workers
from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.sampler import EvalSampler, TrainSampler, shuffled
from dar_lightning.errors import UserError

CHECK = 50  # batches between two comparisons of the ranks' bad samples; fewer at the start
KILLED = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)")
NO_MEMORY = {-9, -7}  # exit codes after SIGKILL and SIGBUS: no main memory, no shared memory
ANOTHER_RUN = "use the same, or start a new run from its weights"


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
        iterator = None
        try:
            iterator = super().__iter__()
            for number, batch in enumerate(self._timed(iterator), start=1):
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
            processes = getattr(self._iterator if iterator is None else iterator, "_workers", ())
            of_memory = NO_MEMORY & {process.exitcode for process in processes}
            hint = f"is there enough memory for {self.num_workers}?" if of_memory else "num_workers=0 may show why"
            message = f"num_workers: {' '.join(str(error).split())}; {hint}"
            error.__traceback__ = None
        self._iterator = iterator = None  # so the workers end at once
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

    def state_dict(self) -> dict[str, int | str]:
        """Where the run stands, and what must be the same for this to mean anything."""
        return {
            "position": self.position - self.unfinished(),
            "global_batch": self.sampler.global_batch,
            "accumulate": self.sampler.accumulate,
            "samples": len(self.sampler.dataset),
            "data_sha256": self.sampler.dataset.data_sha256,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: The global batch or the data are not those of the checkpoint.
        """
        mine = self.state_dict()
        if "fingerprint" in state:  # its name in earlier versions
            state = state | {"data_sha256": state["fingerprint"]}
        for name, what in (
            ("global_batch", "batch size x devices"),
            ("accumulate", "number of batches per optimizer step"),
            ("samples", "number of training samples"),
            ("data_sha256", "hash of the training data (shards' names, contents and classes)"),
        ):
            if state.get(name, mine[name]) != mine[name]:
                raise UserError(
                    f"cannot resume: {what} was {state[name]} in the checkpoint and is {mine[name]} now; {ANOTHER_RUN}"
                )
        self.sampler.position = state["position"]


class StreamDataModule(L.LightningDataModule, ABC):
    """What both DataModules share: their splits, the two kinds of loader, and the place in the data in checkpoints.

    Args:
        train: Where the training data lie.
        val: Where the validation data lie.
        batch_size: Samples per batch and device.
        num_workers: Worker processes per loader; the batches do not depend on it.
        seed: Order of the samples, and crops.
    """

    fixed: tuple[str, ...] = ("seed",)  # options that a resumed run must share
    window: int | None = None  # shards whose samples are mixed; None is all of them
    sources = "data"  # what train and val may be, for the error line

    def __init__(self, train: str | None, val: str | None, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} is not a number of samples, give at least 1")
        if num_workers < 0:
            raise UserError(f"num_workers: {num_workers} is negative, give 0 or more")
        if seed < 0:
            raise UserError(f"seed: {seed} is negative, give 0 or more")
        self.train, self.val = train, val
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._index: dict[str, Any] = {}
        self._loader: TrainLoader | None = None
        self._restored: dict[str, int | str] | None = None

    @abstractmethod
    def _read_index(self, split: str, source: str) -> Any:
        """The index of a split's shards at `source`."""

    @abstractmethod
    def _dataset(self, split: str) -> Dataset:
        """The samples of a split."""

    def index(self, split: str) -> Any:
        """The shards of a split ("train" or "val"), read at first use.

        Raises:
            UserError: The split has none, or they are not as they should be.
        """
        if split not in self._index:
            source = getattr(self, split)
            if source is None:
                raise UserError(f"data.{split}: not set; give {self.sources}")
            self._index[split] = self._read_index(split, source)
        return self._index[split]

    @property
    def _any_index(self) -> Any:
        return self.index("val" if self.train is None else "train")

    def setup(self, stage: str) -> None:
        """Called by the Trainer at the start of everything that it does: training begins anew, or is restored."""
        if stage == "fit":
            self._loader = None

    def train_dataloader(self) -> Loader:
        """Shuffled batches, endless in principle; see `TrainLoader`."""
        dataset = self._dataset("train")
        world, rank, overfit, accumulate = 1, 0, 0, 1
        if self.trainer is not None:
            world, rank, overfit = self.trainer.world_size, self.trainer.global_rank, self.trainer.overfit_batches
            accumulate = self.trainer.accumulate_grad_batches
        if overfit:  # the same few batches in every epoch
            return Loader(dataset, batch_size=self.batch_size, drop_last=True, **workers.options(self.num_workers))
        # with self in the order, the loader would be part of a cycle, and its workers would wait 10 s for their end
        sizes, seed, window = dataset.sizes, self.seed, self.window or len(dataset.sizes)
        sampler = TrainSampler(
            dataset, lambda epoch: shuffled(sizes, seed, epoch, window), self.batch_size, world, rank, accumulate
        )
        if sampler.batches == 0:
            times = f", {accumulate} times," if accumulate > 1 else ""
            raise UserError(
                f"batch_size: {self.batch_size} on {world} device(s){times} is more than the {len(dataset)} training "
                "samples"
            )
        before = self._loader
        options = workers.options(self.num_workers, persistent=True)
        self._loader = TrainLoader(dataset, batch_size=self.batch_size, sampler=sampler, drop_last=True, **options)
        if self.trainer is not None:
            # a checkpoint written in the middle of a step (on an exception or a signal) repeats that step
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            self._loader.unfinished = lambda: progress.ready - progress.processed
        if self._restored is not None:
            self._restore()
        elif before is not None:  # Trainer(reload_dataloaders_every_n_epochs=...)
            self._loader.sampler.position = before.position
        return self._loader

    def val_dataloader(self) -> Loader | list:
        """Every validation sample once; empty without validation data."""
        if self.val is None:
            return []
        dataset, sampler = self._dataset("val"), None  # in order; Lightning then knows that nothing is shuffled
        if self.trainer is not None and self.trainer.world_size > 1:
            sampler = EvalSampler(dataset, self.trainer.world_size, self.trainer.global_rank)
        # Lightning makes it anew for predictions, by the names of its arguments
        return Loader(dataset, batch_size=self.batch_size, sampler=sampler, **workers.options(self.num_workers))

    test_dataloader = predict_dataloader = val_dataloader

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
                    f"cannot resume: data.{name} was {was} in the checkpoint and is {now} now; {ANOTHER_RUN}"
                )
        self._restored = state_dict["stream"]
        if self._loader is not None and self._restored is not None:  # sharded models are restored after the loaders
            self._restore()

    def _restore(self) -> None:
        self._loader.load_state_dict(self._restored)
        self._restored = None
