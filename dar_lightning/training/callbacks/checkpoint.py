"""Checkpoint callbacks: exact resume, and a run that goes on when a checkpoint cannot be written."""

import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from dar_lightning.errors import UserError, naming, whole_line
from dar_lightning.files import is_url

WRITING = timedelta(minutes=15)  # for which a rank that ends waits for the checkpoint of another


class LastStepCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that a run can be killed at, and whose `last.ckpt` holds the last step of a finished run.

    The last step is saved, whatever ends the run, before the average replaces the weights: a run with a larger
    `max_steps` goes on from it. A step is saved before a validation, which may be long, and never while gradients are
    being accumulated. A checkpoint that cannot be written costs a line, and the one before stays; only at the start and
    the end of a run is it an error. Half-written files of killed runs are removed at the start.

    Args:
        save_last: as ModelCheckpoint's, on by default.
        **options: ModelCheckpoint's other options.
    """

    def __init__(self, save_last: bool | None = True, **options: Any):
        super().__init__(save_last=save_last, **options)
        self._problem: str | None = None  # why the latest checkpoint could not be written, on all ranks

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def setup(self, trainer, pl_module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            if is_url(self.dirpath):
                with naming(f"cannot write checkpoints to {self.dirpath}"):  # found before the first step
                    self._fs.makedirs(self.dirpath, exist_ok=True)
                    self._fs.pipe_file(probe := f"{self.dirpath}/.writable", b"")
                    self._fs.rm_file(probe)
                return
            folder = Path(self.dirpath)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for part in folder.glob(".*.ckpt.*.part"):
                    part.unlink()
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise UserError(f"cannot write checkpoints to {folder}: {error.strerror}") from error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        loop = trainer.fit_loop.epoch_loop
        if trainer.global_step == trainer.max_steps:
            self._save_end(trainer)
        elif loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.fit_loop.done:  # by max_epochs, max_time or early stopping
            self._save_end(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        if not trainer.fast_dev_run:  # which Lightning's forgets to ask
            super().on_train_end(trainer, pl_module)

    def _find_last_checkpoints(self, trainer) -> set[str]:
        found = super()._find_last_checkpoints(trainer)
        # of a URL, Lightning's drops the scheme
        return {f"{self.dirpath}/{Path(path).name}" for path in found} if is_url(self.dirpath) else found

    def save_now(self, trainer) -> str | None:
        """Save this step as the last one, unless that is done or gradients are being accumulated; returns `saved`."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.saved(trainer)

    def saved(self, trainer) -> str | None:
        """The file that holds this step, None if there is none."""
        return self._last_checkpoint_saved if self._last_global_step_saved == trainer.global_step else None

    def save_alone(self, trainer) -> None:
        """Save the last step without the other ranks, which may be in the midst of the next one: for a run that breaks.

        Between two steps each rank has all that a checkpoint holds. Of several that call this, the first one writes,
        and the others wait for it, since the first that ends takes all with it, and learn whether it could. A sharded
        model is in no rank alone, and not saved; nor is a step that is saved already, or one in validation, whose
        weights may be averages. What goes wrong here is a line: the run has broken of something else.
        """
        sharded = any(isinstance(tensor, DTensor) for tensor in trainer.lightning_module.parameters())
        if not self.save_last or sharded or not trainer.training or super()._should_skip_saving_checkpoint(trainer):
            return
        step, path, store = trainer.global_step, "", None  # no path: not saved
        if trainer.world_size > 1:
            store = torch.distributed.distributed_c10d._get_default_store()
        key = f"{self.state_key} {self.dirpath} {step}"
        try:
            if store is None or store.add(key, 1) == 1:
                try:
                    path = self._write_alone(trainer)
                finally:
                    if store is not None:
                        store.set(f"{key} ends", path)
            else:
                store.wait([f"{key} ends"], WRITING)
                path = store.get(f"{key} ends").decode()
                if not path:
                    raise UserError("the rank that was to save could not")
        except (UserError, RuntimeError) as error:  # of the disk, or of a store whose rank is gone
            outcome = "saved, which other ranks do not know" if path else "not saved"
            print(f"WARNING: {whole_line(error)}; step {step} is {outcome}", file=sys.stderr, flush=True)
        if path:
            self.last_model_path = self._last_checkpoint_saved = path
            self._last_global_step_saved = step

    def _write_alone(self, trainer) -> str:
        names = (self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST, ver=ver) for ver in (None, *range(1, 1000)))
        self.last_model_path = self.last_model_path or next(name for name in names if not self._fs.exists(name))
        checkpoint = trainer._checkpoint_connector.dump_checkpoint()
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self.last_model_path)
        return self.last_model_path

    def _save_end(self, trainer) -> None:
        self.save_now(trainer)
        if self._problem is not None:
            raise UserError(f"{self._problem}; the same command trains again from the checkpoint before")

    def _should_skip_saving_checkpoint(self, trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or trainer.fit_loop.epoch_loop._should_accumulate()

    def _should_remove_checkpoint(self, trainer, previous: str, current: str) -> bool:
        return self._problem is None and super()._should_remove_checkpoint(trainer, previous, current)

    def _save_checkpoint(self, trainer, filepath: str) -> None:
        before, problem = (self._last_global_step_saved, self._last_checkpoint_saved), None
        try:
            super()._save_checkpoint(trainer, filepath)
        except UserError as error:  # on rank 0, which writes
            problem = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait
        self._problem = trainer.strategy.broadcast(problem)
        if self._problem is not None:
            self._last_global_step_saved, self._last_checkpoint_saved = before
            if trainer.is_global_zero:
                goes_on = f"step {trainer.global_step} is not saved, step {before[0]} was; training goes on"
                print(f"WARNING: {self._problem}; {goes_on}", file=sys.stderr, flush=True)
