"""A server of shards that goes away in the middle of training: it is waited for, and the run loses no step."""

import functools
import os
import re
import signal
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from refusals import refusal
from tiny_models import fit_tokenizer
from tiny_shards import write_set

from dar_lightning.cli import main
from dar_lightning.training.callbacks import stop

STEPS, AWAY_AFTER = 4, 5  # steps of two batches; the server goes in the middle of the third


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words) -> None:
        pass


class Server:
    """Serves a folder, always on the same port, or is away."""

    def __init__(self, folder: Path) -> None:
        self.handler = functools.partial(Quiet, directory=str(folder))
        self.port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Away(Callback):
    """Takes the server away after some batches; for so many seconds, if it comes back."""

    server: Server
    seconds: float | None = None
    signal: int | None = None  # that comes while it is away

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == AWAY_AFTER:
            self.server.stop()
            if self.seconds is not None:
                threading.Timer(self.seconds, self.server.start).start()
            if self.signal is not None:
                threading.Timer(0.3, os.kill, (os.getpid(), self.signal)).start()


class AwayLate(Away, Checkpoint):
    """The last callback of a step, in which a signal comes and stays for long."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == AWAY_AFTER:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(3 * stop.GRACE)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A picture in each, so that each batch needs a shard that is not here yet."""
    folder = tmp_path_factory.mktemp("shards")
    write_set(folder, [1] * 12)
    return folder


@pytest.fixture
def server(shards):
    server = Away.server = Server(shards)
    yield server
    server.stop()


def command(source: str, folder: Path, *more: str) -> list[str]:
    words = [
        *fit_tokenizer(source, source, folder, max_steps=STEPS, limit_val_batches=0),
        *("--data.init_args.batch_size=1", "--global_batch=2", "--ckpt_path=last"),
        f"--data.init_args.cache_dir={folder / 'cache'}",
        "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
        *("--trainer.callbacks.every_n_train_steps=100", "--trainer.callbacks.save_top_k=0"),
    ]
    return [str(word) for word in (*words, *more)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == step
    return checkpoint["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def unbroken(shards, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("unbroken")
    main(command(str(shards), folder))
    return weights(folder, STEPS)


def test_a_server_that_comes_back(server, unbroken, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Away, "seconds", 0.7)
    began = time.monotonic()
    main(command(server.url, tmp_path, f"--trainer.callbacks+={__name__}.Away"))
    assert time.monotonic() - began > 0.7
    assert same(unbroken, weights(tmp_path, STEPS))
    tried, copied = [record.getMessage() for record in caplog.records if "copied" in record.getMessage()]
    assert tried.startswith(f"{server.url}/0000")
    assert "ClientConnectorError" in tried
    assert copied.endswith("is copied now")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_stays_away(server, unbroken, tmp_path, capsys, workers):
    """The step at hand is saved, though half of the next one's gradients are there; the same command goes on."""
    words = command(server.url, tmp_path, "--data.init_args.patience=0.3", f"--data.init_args.num_workers={workers}")
    with pytest.raises(SystemExit) as stop:
        main([*words, f"--trainer.callbacks+={__name__}.Away"])
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dar fit: ")]
    step = AWAY_AFTER // 2 if workers == 0 else r"\d"  # workers are ahead
    file = re.escape(str(tmp_path / "checkpoints" / "last.ckpt"))
    says = rf"{server.url}/0000.* cannot be copied, tried .*; last checkpoint: {file}, of step {step}$"
    assert re.match(f"dar fit: {says}", line), line
    server.start()
    main(words)
    assert same(unbroken, weights(tmp_path, STEPS))


def test_a_signal_while_the_server_is_away(server, unbroken, tmp_path, capsys, monkeypatch):
    """A cluster kills soon after it: no quarter of an hour is left to wait for the step's end."""
    monkeypatch.setattr(Away, "signal", signal.SIGUSR1)
    monkeypatch.setattr(stop, "GRACE", 0.3)
    alarm, words = signal.getsignal(signal.SIGALRM), command(server.url, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*words, f"--trainer.callbacks+={__name__}.Away"])
    assert ended.value.code == 128 + signal.SIGUSR1
    said = f"SIGUSR1: stopped after step {AWAY_AFTER // 2}, saved in {tmp_path}/checkpoints/last.ckpt"
    assert said in capsys.readouterr().err.splitlines()
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]) == (alarm, 0)
    server.start()
    main(words)
    assert same(unbroken, weights(tmp_path, STEPS))


def test_a_step_that_is_longer_than_the_wait_for_a_batch(server, tmp_path, capsys, monkeypatch):
    """The alarm that finds a step at work comes again."""
    monkeypatch.setattr(stop, "GRACE", 0.1)
    words = command(server.url, tmp_path, "--data.init_args.patience=5", f"--trainer.callbacks+={__name__}.AwayLate")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 128 + signal.SIGUSR1
    said = f"SIGUSR1: stopped after step {AWAY_AFTER // 2}, saved in {tmp_path}/checkpoints/last.ckpt"
    assert said in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("timeout", "patience"), [("0:10:00", 900), ("0:15:00", 900), ("0:10:00", 601)])
def test_ranks_that_wait_no_longer_than_the_server_may_be_away(timeout, patience, server, tmp_path, capsys):
    words = command(server.url, tmp_path, "--trainer.devices=2", "--trainer.strategy=DDPStrategy")
    words += [f"--trainer.strategy.timeout={timeout}", f"--data.init_args.patience={patience}"]
    seconds = 60 * int(timeout.split(":")[1])
    said = f"dar fit: data.patience is {patience} s, but ranks wait for one another {seconds} s only: give "
    assert refusal(capsys, words).startswith(said)
