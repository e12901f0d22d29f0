"""`last.ckpt` is the last step, whatever ends the run; signals end a run after its step with a telling exit code."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import fit_ar

from dar_lightning.cli import main

OURS = "dar_lightning.training.callbacks.LastStepCheckpoint"


def run(tokens, folder, checkpoint: str = OURS, *options: str, **trainer) -> None:
    words = [
        *fit_ar(*tokens, folder, limit_val_batches=0, **trainer),
        *(f"--trainer.callbacks+={checkpoint}", "--trainer.callbacks.every_n_train_steps=2"),
        *("--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=0", "--ckpt_path=last"),
        *("--trainer.callbacks+=dar_lightning.training.callbacks.EMA", "--trainer.callbacks.decay=0.9"),
    ]
    main([str(word) for word in (*words, *options)])


def saved(folder) -> dict:
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    return torch.load(folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(("end", "step"), [({"max_steps": 3}, 3), ({"max_steps": 4}, 4), ({"max_epochs": 1}, 5)])
def test_the_last_step_is_saved(tokens, tmp_path, end, step):
    run(tokens, tmp_path, **end)
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == step
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(raw[name], average[name]) for name in average), "the optimizer's weights are kept"


def test_a_longer_run_goes_on_from_it(tokens, tmp_path):
    """From Lightning's checkpoint of step 2 too, and from the last step."""
    run(tokens, tmp_path / "parts", "ModelCheckpoint", max_steps=3)
    for steps in (5, 7):
        run(tokens, tmp_path / "parts", max_steps=steps)
    run(tokens, tmp_path / "whole", max_steps=7)
    parts, whole = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    assert parts["global_step"] == whole["global_step"] == 7
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, whole[key][name]) for name, tensor in parts[key].items())


# ---- signals of the system, in this process


class SignalIn(Callback):
    """Sends signals to this process in the first batch of a step."""

    def __init__(self, step: int, number: int, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def stopped(tokens, folder, checkpoint=OURS, **signal_in) -> int:
    words = [f"--trainer.callbacks+={__name__}.SignalIn"]
    words += [f"--trainer.callbacks.{name}={int(value)}" for name, value in ({"step": 1} | signal_in).items()]
    with pytest.raises(SystemExit) as caught:
        run(tokens, folder, checkpoint, *words, max_steps=6, accumulate_grad_batches=2)
    return caught.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_done_and_saved(tokens, tmp_path, capsys, number, code):
    before = signal.getsignal(number)
    assert stopped(tokens, tmp_path, number=number) == code
    batches = saved(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    assert (saved(tmp_path)["global_step"], batches) == (2, 4), "the other half of the accumulated step is done, too"
    line = f"{number.name}: stopped after step 2, saved in {tmp_path / 'checkpoints' / 'last.ckpt'}"
    assert line in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_second_interrupt_does_not_wait(tokens, tmp_path):
    assert stopped(tokens, tmp_path, number=signal.SIGINT, times=2) == 1
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_without_our_checkpoints_it_says_that_nothing_was_saved(tokens, tmp_path, capsys):
    assert stopped(tokens, tmp_path, "ModelCheckpoint", number=signal.SIGTERM) == 143
    assert "SIGTERM: stopped after step 2, not saved, the checkpoint before is the last" in capsys.readouterr().err
