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


@pytest.mark.parametrize(("end", "step"), [({"max_steps": 4}, 4), ({"max_epochs": 1}, 5)])
def test_the_last_step_is_saved(tokens, tmp_path, end, step):
    run(tokens, tmp_path, **end)
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == step
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(raw[name], average[name]) for name in average), "the optimizer's weights are kept"


def test_a_longer_run_goes_on_from_it(tokens, tmp_path):
    """From Lightning's checkpoint of step 2 too, and from the last step, which is no multiple."""
    run(tokens, tmp_path / "parts", "ModelCheckpoint", max_steps=3)
    for steps in (5, 7):
        run(tokens, tmp_path / "parts", max_steps=steps)
        assert saved(tmp_path / "parts")["global_step"] == steps
    run(tokens, tmp_path / "whole", max_steps=7)
    parts, whole = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, whole[key][name]) for name, tensor in parts[key].items())


class SignalIn(Callback):
    """Sends signals to this process in the first batch of the second step."""

    def __init__(self, number: int, times: int = 1) -> None:
        self.number, self.times = number, times

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        while trainer.global_step == 1 and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "times", "checkpoint", "code", "says"),
    [
        (signal.SIGTERM, 1, OURS, 143, "stopped after step 2, saved in {}"),
        (signal.SIGINT, 1, OURS, 130, "stopped after step 2, saved in {}"),
        (signal.SIGINT, 2, OURS, 1, None),  # does not wait
        (signal.SIGTERM, 1, "ModelCheckpoint", 143, "stopped after step 2, not saved, the checkpoint before is"),
    ],
)
def test_a_signal_ends_the_run_after_the_step(tokens, tmp_path, capsys, number, times, checkpoint, code, says):
    before, file = signal.getsignal(number), tmp_path / "checkpoints" / "last.ckpt"
    words = [f"--trainer.callbacks+={__name__}.SignalIn", f"--trainer.callbacks.number={int(number)}"]
    words += [f"--trainer.callbacks.times={times}"]
    with pytest.raises(SystemExit) as caught:
        run(tokens, tmp_path, checkpoint, *words, max_steps=6, accumulate_grad_batches=2)
    assert caught.value.code == code
    assert signal.getsignal(number) == before
    error = capsys.readouterr().err
    if says is None:
        assert not file.exists()
    else:
        assert f"{number.name}: {says.format(file)}" in error
    if says and checkpoint == OURS:
        batches = saved(tmp_path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert (saved(tmp_path)["global_step"], batches) == (2, 4), "the other half of the step is done, too"
