"""Graceful stop at SIGTERM, SIGUSR1 and Ctrl+C: finish the step, save a checkpoint, exit."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_stack
from types import FrameType

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.trainer.states import TrainerFn

from dar_lightning.errors import UserError, phase
from dar_lightning.training.callbacks.checkpoint import LastStepCheckpoint
from dar_lightning.training.late_reading import LateReading

GRACE = 20.0  # seconds for which the next batch is waited for after a signal: clusters kill half a minute after theirs


class NoBatch(SystemExit):
    """Ends a run that a signal has asked to stop, and whose next batch does not come."""


@contextmanager
def refusing_early_notice() -> Iterator[None]:
    """End with a UserError at a SIGUSR1 that comes before training does: there is nothing to save, only to do again.

    From the first step on, StopOnSignal answers it. Lightning, which finds an answer, leaves its own out (see there).
    """

    def refuse(number: int, frame: FrameType | None) -> None:
        if not phase.working:  # at the end of training, one more says nothing new
            raise UserError(
                "SIGUSR1 came before the first step, nothing is saved; SLURM's --time must be longer than the notice "
                "of --signal by the time to start and to train in"
            )

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGUSR1, refuse)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)


class StopOnSignal(Callback):
    """Ends training after the current optimizer step, with a checkpoint of it, when a signal asks for it.

    SIGTERM (from `kill`, SLURM, torchrun, Kubernetes) ends with exit code 143, SIGUSR1 (SLURM before a time limit, see
    experiments/cluster/slurm.sh) with 138, SIGINT (Ctrl+C) with 130; a second Ctrl+C interrupts at once. A validation,
    whose step LastStepCheckpoint has saved, ends after the current batch (one of the images that GenerationFID draws,
    too), unless gradients are being accumulated: the step comes first then. A signal to any rank stops all of them
    after the same step; several GPUs stop one step later, since none waits to hear of the others' signals. Ranks that
    Lightning has started end with 0: with anything else it would kill the run at once.

    Where the step cannot be finished, since its batch does not come within 20 s (a server is away), the one before is
    saved by the rank that waits, which then ends with the signal's code. The others, in a step that has no end, are
    ended by whatever has started them: the code of the whole is that launcher's (docs/resume.md).

    Lightning's own answer to SIGTERM saves nothing, and makes ranks wait for each other before every batch; that to
    SIGUSR1 under SLURM saves from within the signal, where ranks at different places of a step wait for each other
    without end.
    """

    def __init__(self) -> None:
        self._signal = 0  # number of the one received
        self._training = False

    def on_train_start(self, trainer, pl_module) -> None:
        self._signal = int(signal.SIGTERM) if trainer.received_sigterm else 0
        self._late = LateReading()
        # Lightning's question, for which nothing sets the flag any more once SIGTERM comes here.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)  # at its end, the Trainer brings back what was before it
        signal.signal(signal.SIGALRM, self._give_up)
        self._training = True

    def on_train_end(self, trainer, pl_module) -> None:
        self._quiet()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self._quiet()
        if isinstance(exception, NoBatch):
            callbacks = [found for found in trainer.checkpoint_callbacks if isinstance(found, LastStepCheckpoint)]
            for found in callbacks:
                found.save_alone(trainer)
            self._say(trainer, [found.saved(trainer) for found in callbacks])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._obey(trainer, pl_module)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.obey_in_validation(trainer, pl_module)

    def obey_in_validation(self, trainer, pl_module) -> None:
        """End training, if a signal asks for it, in the midst of a validation. All ranks call this together."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._obey(trainer, pl_module, validating=True)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal:
            raise KeyboardInterrupt
        self._signal = number
        self._wait_anew()

    def _wait_anew(self) -> None:
        if self._signal and self._training:
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if any(isinstance(each.f_locals.get("self"), _DataFetcher) for each, _ in walk_stack(frame)):
            raise NoBatch(128 + self._signal)
        signal.setitimer(signal.ITIMER_REAL, GRACE)  # in a step, which may be long

    def _quiet(self) -> None:
        """Switch the alarm off: after training nothing handles it, and it would end the process."""
        training, self._training = self._training, False  # first: a signal that comes now sets none
        if self._signal and training:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _say(self, trainer, files: list[str | None]) -> None:
        saved = [f"saved in {file}" for file in files if file]
        name = signal.Signals(self._signal).name
        said = f"{name}: stopped after step {trainer.global_step}, "
        print(said + (saved or ["not saved, the checkpoint before is the last"])[0], file=sys.stderr, flush=True)

    def _obey(self, trainer, pl_module, validating: bool = False) -> None:
        self._wait_anew()
        if trainer.fit_loop.epoch_loop._should_accumulate():  # gradients in the making are in no checkpoint
            return
        number, many = self._signal, trainer.world_size > 1
        if many:  # what any rank has received
            received = torch.full((1,), number, device=pl_module.device)  # torch.tensor would wait for the device
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            (number,) = received.tolist() if validating else self._late.exchange(received) or (0,)
        if not number:
            return
        callbacks = [found for found in trainer.checkpoint_callbacks if isinstance(found, LastStepCheckpoint)]
        # In a validation the weights may be the averages, and the step has been saved before it.
        files = [found.saved(trainer) if validating else found.save_now(trainer) for found in callbacks]
        self._signal = number  # of any rank
        if trainer.is_global_zero:
            self._say(trainer, files)
        external = not many or trainer.strategy.cluster_environment.creates_processes_externally
        raise SystemExit(128 + number if external or trainer.is_global_zero else 0)
