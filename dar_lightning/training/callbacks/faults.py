"""Where a run stands when it breaks: before its first batch, or in its work, and at which checkpoint.

What the data raise, when a server is gone for good, say, comes between two steps: the last one is saved.
"""

from traceback import walk_tb

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.states import TrainerFn

from dar_lightning.errors import begin_work, find_user_error, phase
from dar_lightning.training.callbacks.checkpoint import LastStepCheckpoint

PARTS = Callback, LightningDataModule, LightningModule  # that users name in their configs


class Faults(Callback):
    """Says that the work has begun once the first batch is done, and adds the last checkpoint to what is raised later.

    What a run is built from, Lightning's checks, the sanity validation and the first batch are before: what goes wrong
    there is a mistake of the user's as a rule. What comes out of the loader, later, leaves a whole step, which
    LastStepCheckpoint then saves. `dar fit` always has this callback.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        begin_work()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not trainer.sanity_checking:
            begin_work()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        owners = [frame.f_locals.get("self") for frame, _ in walk_tb(exception.__traceback__)]
        named = [type(each).__name__ for each in owners if isinstance(each, PARTS)]
        if named and not phase.working and find_user_error(exception) is None:
            exception.add_note(f"in {named[-1]}")
        if not phase.working or trainer.state.fn != TrainerFn.FITTING:
            return
        savers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        if isinstance(exception, Exception) and any(isinstance(each, _DataFetcher) for each in owners):
            for saver in savers:
                if isinstance(saver, LastStepCheckpoint):
                    saver.save_alone(trainer)
        saved = [(each._last_global_step_saved, each._last_checkpoint_saved) for each in savers]
        step, file = max((each for each in saved if each[1]), default=(0, None))
        before = f"the run began with {trainer.ckpt_path}" if trainer.ckpt_path else "this run has written none"
        exception.add_note(f"last checkpoint: {before if file is None else f'{file}, of step {step}'}")
