"""The step that is saved when no batch comes any more: one rank writes it, and all of them know whether it is there."""

import errno
import io
import os
import signal
import time
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from tiny_models import fit_ar
from torch.distributed import DistStoreError

from dar_lightning.cli import main
from dar_lightning.errors import MachineFault
from dar_lightning.training.callbacks import LastStepCheckpoint, StopOnSignal, stop


class NoMore(Callback):
    """After two steps the data fail, or never come, and a signal does."""

    def __init__(self, fault: bool):
        self.fault = fault

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.fit_loop._data_fetcher.iterator = self.batches()

    def batches(self):
        if self.fault:
            raise MachineFault("the server is gone")
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
        yield


def full_disk(*arguments, **options) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def end(words: list[str], full: bool) -> tuple[int, list[str]]:
    """How a rank ends, and the lines that it says of the step."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(stop, "GRACE", 0.2)
        if full:
            patch.setattr(torch, "save", full_disk)
        with pytest.raises(SystemExit) as ended:
            main(words)
    lines = said.getvalue().splitlines()
    return ended.value.code, [line for line in lines if line.startswith(("WARNING: ", "SIGUSR1: ", "dar fit: "))]


@pytest.mark.parametrize(("fault", "full"), [(False, False), (True, False), (False, True), (True, True)])
def test_two_ranks_that_lack_a_batch(fault, full, tokens, two_ranks, tmp_path):
    words = [
        *fit_ar(*tokens, tmp_path, max_steps=4, limit_val_batches=0),
        *("--trainer.devices=2", "--data.init_args.batch_size=2"),
        *(f"--trainer.callbacks+={__name__}.NoMore", f"--trainer.callbacks.fault={str(fault).lower()}"),
        "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
        *("--trainer.callbacks.every_n_train_steps=100", "--trainer.callbacks.save_top_k=0"),
    ]
    ends = two_ranks(end, [str(word) for word in words], full)
    file = tmp_path / "checkpoints" / "last.ckpt"
    assert [code for code, _ in ends] == [1 if fault else 128 + signal.SIGUSR1] * 2
    if full:
        before, result = "this run has written none", "not saved, the checkpoint before is the last"
    else:
        before, result = f"{file}, of step 2", f"saved in {file}"
        assert torch.load(file)["global_step"] == 2
    last = f"dar fit: the server is gone; last checkpoint: {before}"
    assert {said[-1] for _, said in ends} == {last if fault else f"SIGUSR1: stopped after step 2, {result}"}
    warned = {f"cannot write {file}: No space left on device", "the rank that was to save could not"} if full else ()
    found = sorted(line for _, said in ends for line in said[:-1])
    assert found == sorted(f"WARNING: {reason}; step 2 is not saved" for reason in warned)


class Store:
    """The ranks' store, whose rank is gone: at the first call, or at the last."""

    def __init__(self, fails: str):
        self.fails = fails

    def add(self, key: str, amount: int) -> int:
        return self._answer("add", amount)

    def set(self, key: str, value: str) -> None:
        self._answer("set", None)

    def _answer(self, call: str, answer):
        if call == self.fails:
            raise DistStoreError("Connection reset by peer")
        return answer


@pytest.mark.parametrize(("fails", "outcome"), [("add", "not saved"), ("set", "saved, which other ranks do not know")])
def test_a_store_that_is_gone_is_a_line(fails, outcome, tmp_path, monkeypatch, capsys):
    """Its error would take the place of what the run broke of."""
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: Store(fails))
    files = []
    trainer = SimpleNamespace(
        **{"training": True, "fast_dev_run": False, "sanity_checking": False, "global_step": 3, "world_size": 2},
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        lightning_module=torch.nn.Linear(1, 1),
        strategy=SimpleNamespace(checkpoint_io=SimpleNamespace(save_checkpoint=lambda state, path: files.append(path))),
        _checkpoint_connector=SimpleNamespace(dump_checkpoint=dict),
    )
    checkpoint = LastStepCheckpoint(dirpath=tmp_path)
    checkpoint.save_alone(trainer)
    assert capsys.readouterr().err == f"WARNING: Connection reset by peer; step 3 is {outcome}\n"
    expected = [] if fails == "add" else [str(Path(tmp_path) / "last.ckpt")]
    assert files == expected
    assert checkpoint.saved(trainer) == (expected[0] if expected else None)


def test_a_signal_at_the_very_end_sets_no_alarm(monkeypatch):
    """Once the run is over, nobody answers an alarm: it would end the process."""
    callback, timers = StopOnSignal(), [stop.GRACE]
    callback._signal, callback._training = signal.SIGTERM, True

    def set_timer(which: int, seconds: float) -> None:
        timers.append(seconds)
        if timers == [stop.GRACE, 0]:
            callback._receive(signal.SIGUSR1, None)

    monkeypatch.setattr(signal, "setitimer", set_timer)
    callback._quiet()
    assert timers == [stop.GRACE, 0]
