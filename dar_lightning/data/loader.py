"""DataLoaders with a resumable position, and the base class of both DataModules."""

from collections.abc import Iterator
from time import perf_counter
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from dar_lightning.data import workers
from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.classes import check_same_classes
from dar_lightning.data.sampler import EvalSampler, TrainSampler, shuffled
from dar_lightning.errors import UserError, check_range

CHECK = 50  # batches between two comparisons of the ranks' bad samples; fewer at the start
SHARED = {  # what must be the same for a position to mean anything
    "global_batch": "batch size x devices",
    "accumulate": "number of batches per optimizer step",
    "samples": "number of training samples",
    "data_sha256": "hash of the training data (shards' names, contents and classes)",
}


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
        together = dist.is_available() and dist.is_initialized()
        together = together and isinstance(self.sampler, (TrainSampler, EvalSampler))  # all ranks have as many batches
        batches = None
        try:
            batches = super().__iter__()
            start = perf_counter()
            for number, batch in enumerate(batches, start=1):
                self.waited += perf_counter() - start
                self.given += 1
                if skipped is not None:
                    skipped.add(bad for bad in map(Bad, *batch.pop("skipped")) if bad.reason)
                    often = self.given.bit_count() == 1 or self.given % CHECK == 0
                    if not together or often or number == len(self):
                        skipped.check(everywhere=together)
                yield batch
                start = perf_counter()
            return
        except (UserError, RuntimeError) as error:
            if (mistake := workers.user_error(error, "num_workers", 0)) is None:
                raise
            error.__traceback__ = None  # its frames hold the workers, too
        # The workers end now. torch waits up to 5 s for each; ended at once, they would leave half a copy behind.
        self._iterator = batches = None
        raise mistake


class TrainLoader(Loader):
    """Counts the batches that it has given out, in its sampler's `position`, and starts anywhere.

    An iteration gives one epoch's worth, so a run that was stopped in mid-epoch, or is limited to a part of each epoch,
    goes on with the next batch.
    """

    sampler: TrainSampler
    progress: Any = None  # Lightning's count of batches in this epoch

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int | str]:
        """Where the run stands, and what must be the same for this to mean anything."""
        # a checkpoint written in the middle of a step (on an exception or a signal) repeats that step
        unfinished = 0 if self.progress is None else self.progress.ready - self.progress.processed
        return {
            "position": self.sampler.position - unfinished,
            "global_batch": self.sampler.global_batch,
            "accumulate": self.sampler.accumulate,
            "samples": len(self.dataset),
            "data_sha256": self.dataset.data_sha256,
        }

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from a checkpoint; a UserError if its global batch or data were others."""
        _check_same(state, self.state_dict())
        self.sampler.position = state["position"]


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A UserError where a checkpoint has another value."""
    for name, value in now.items():
        if (was := before.get(name, value)) != value and name != "position":
            raise UserError(
                f"cannot resume: {SHARED.get(name, f'data.{name}')} was {was} in the checkpoint and is {value} now; "
                "use the same, or start a new run from its weights"
            )


class StreamDataModule(L.LightningDataModule):
    """What both DataModules share: their splits, the two kinds of loader, and the place in the data in checkpoints.

    A subclass has `_read_index(split, source)`, which reads what lies at `train` or `val`, and `_dataset(split)`.
    """

    fixed: tuple[str, ...] = ("seed",)  # what a resumed training must share
    always_fixed: tuple[str, ...] = ()  # the same, also for validation
    window: int | None = None  # shards whose samples are mixed; None is all of them
    sources: str  # what train and val may be, for the error line

    def __init__(self, train: str | None, val: str | None, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        check_range(1, **{"data.batch_size": batch_size})
        check_range(0, workers.MOST, **{"data.num_workers": num_workers})
        check_range(0, **{"data.seed": seed})
        self.train, self.val = train, val
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._index: dict[str, Any] = {}
        self._loader: TrainLoader | None = None
        self._restored: dict[str, int | str] | None = None  # a checkpoint's place, until there is a loader

    @property
    def splits(self) -> list[str]:
        """Those of "train" and "val" that are set; "train" where neither is, whose index then says so."""
        return [split for split in ("train", "val") if getattr(self, split) is not None] or ["train"]

    def index(self, split: str) -> Any:
        """The shards of a split, read at first use; a UserError if it has none, or they are not as they should be."""
        if split not in self._index:
            if (source := getattr(self, split)) is None:
                raise UserError(f"data.{split}: not set; give {self.sources}")
            self._index[split] = self._read_index(split, source)
        return self._index[split]

    @property
    def _any_index(self) -> Any:
        return self.index(self.splits[0])

    def setup(self, stage: str) -> None:
        """Called by the Trainer at the start of everything that it does: training begins anew, or is restored."""
        if stage == "fit":
            self.check_classes()
            self._loader = None

    def check_classes(self) -> None:
        """Check that training and validation number their classes alike; a UserError if they do not."""
        check_same_classes({f"data.{split}": self.index(split).classes for split in self.splits})

    def train_dataloader(self) -> Loader:
        """Shuffled batches, endless in principle; see `TrainLoader`."""
        dataset, trainer = self._dataset("train"), self.trainer
        options = {"batch_size": self.batch_size, "drop_last": True}
        if trainer is not None and trainer.overfit_batches:  # the same few batches in every epoch
            return Loader(dataset, **options, **workers.options(self.num_workers))
        world, rank, accumulate = 1, 0, 1
        if trainer is not None:
            world, rank, accumulate = trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches
        # with self in the order, the loader would be part of a cycle, and its workers would wait 10 s for their end
        sizes, seed, window = dataset.sizes, self.seed, self.window or len(dataset.sizes)
        sampler = TrainSampler(
            dataset, lambda epoch: shuffled(sizes, seed, epoch, window), self.batch_size, world, rank, accumulate
        )
        if sampler.batches == 0:
            needed = f"{self.batch_size} x {world} devices x {accumulate} batches per step"
            raise UserError(f"data.batch_size: {needed} is more than the {len(dataset)} training samples")
        if self._loader is not None:  # Trainer(reload_dataloaders_every_n_epochs=...)
            sampler.position = self._loader.sampler.position
        options |= workers.options(self.num_workers, persistent=True)
        self._loader = TrainLoader(dataset, sampler=sampler, **options)
        if trainer is not None:
            self._loader.progress = trainer.fit_loop.epoch_loop.batch_progress.current
        self._restore()
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
        return {"stream": stream, **{name: getattr(self, name) for name in (*self.fixed, *self.always_fixed)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, before a batch is given out; a UserError if the data would be others."""
        training = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        names = (*self.fixed, *self.always_fixed) if training else self.always_fixed
        _check_same(state_dict, {name: getattr(self, name) for name in names})
        self._restored = state_dict["stream"]
        self._restore()

    def _restore(self) -> None:
        """Take the checkpoint's place, if there is one; sharded models are restored after the loaders are made."""
        if self._loader is not None and self._restored is not None:
            self._loader.load_state_dict(self._restored)
            self._restored = None
