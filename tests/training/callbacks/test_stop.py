"""Signals end a run after its step, with a checkpoint and a telling exit code; those of the system, in this process."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import fit_ar

from dar_lightning.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers


class SignalIn(Callback):
    """Sends signals to this process in the first batch of a step."""

    def __init__(self, step: int, number: int, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def fit(tokens, folder, checkpoint="dar_lightning.training.callbacks.LastStepCheckpoint", **signal_in) -> int:
    words = [
        *fit_ar(*tokens, folder, max_steps=6, accumulate_grad_batches=2, limit_val_batches=0),
        *(f"--trainer.callbacks+={checkpoint}", f"--trainer.callbacks+={__name__}.SignalIn"),
        *(f"--trainer.callbacks.{name}={int(value)}" for name, value in signal_in.items()),
    ]
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return caught.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_done_and_saved(tokens, tmp_path, capsys, number, code):
    before = signal.getsignal(number)
    assert fit(tokens, tmp_path, step=1, number=number) == code
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path)
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    assert (checkpoint["global_step"], batches) == (2, 4), "the other half of the accumulated step is done, too"
    assert f"{number.name}: stopped after step 2, saved in {path}" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait(tokens, tmp_path):
    assert fit(tokens, tmp_path, step=1, number=signal.SIGINT, times=2) == 1
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_without_our_checkpoints_it_says_that_nothing_was_saved(tokens, tmp_path, capsys):
    assert fit(tokens, tmp_path, checkpoint="ModelCheckpoint", step=1, number=signal.SIGTERM) == 143
    assert "SIGTERM: stopped after step 2, not saved, the checkpoint before is the last" in capsys.readouterr().err
