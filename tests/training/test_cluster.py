"""The cluster's scripts, truly run: two nodes of one process each end with the bits of two processes on one node."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_models import fit_ar

from dar_lightning.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SCRIPTS = Path(__file__).parents[2] / "experiments" / "cluster"
STEPS, SECONDS = 20, 240

# As SLURM's: starts the tasks of a step, hands signals to all their processes, and ends with the largest status. A task
# that fails ends the others.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys, time
words = sys.argv[1:]
assert words.pop(0) == "--kill-on-bad-exit=1"
places = [{{"SLURM_PROCID": str(n), "SLURM_NODEID": str(n), "SLURM_LOCALID": "0"}} for n in range(2)]
tasks = [subprocess.Popen(words, env=os.environ | place, start_new_session=True) for place in places]
signal.signal(signal.SIGUSR1, lambda *_: [os.killpg(task.pid, signal.SIGUSR1) for task in tasks])
while None in (states := [task.poll() for task in tasks]):
    if any(states):
        time.sleep(1)
        [task.kill() for task in tasks if task.poll() is None]
    time.sleep(0.05)
sys.exit(max(status if status >= 0 else 128 - status for status in states))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "$SCONTROL_LOG"\n'


class Slow(Callback):
    """Leaves time for a signal, and says which step has begun."""

    def __init__(self, file: str):
        self.file = Path(file)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.file.write_text(str(trainer.global_step))
        time.sleep(0.05)


class DiesOnce(Callback):
    """Kills rank 1 in the middle of a run, the first time."""

    def __init__(self, file: str):
        self.file = Path(file)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == STEPS // 2 and trainer.global_rank == 1 and not self.file.exists():
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def arguments(tokens, folder: Path, every: int = 1000) -> list[str]:
    """What both nodes are given, but for their number."""
    return [
        *map(str, fit_ar(*tokens, folder, max_steps=STEPS, val_check_interval=3)[1:]),
        *("--ckpt_path=last", "--data.init_args.batch_size=2"),
        "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
        *(f"--trainer.callbacks.every_n_train_steps={every}", "--trainer.callbacks.save_top_k=0"),
        "--trainer.callbacks+=dar_lightning.training.callbacks.EMA",
    ]


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt")


def check(folder: Path, reference: Path) -> None:
    one, two = last(folder), last(reference)
    assert one["global_step"] == two["global_step"] == STEPS
    for key in ("state_dict", "current_model_state"):
        assert one[key].keys() == two[key].keys()
        assert all(torch.equal(tensor, two[key][name]) for name, tensor in one[key].items())


@pytest.fixture(scope="module")
def on_one_node(tokens, two_ranks):
    """Trains in a folder with two processes on one node, without a break."""
    return lambda folder: two_ranks(main, ["fit", *arguments(tokens, folder), "--trainer.devices=2"])


@pytest.fixture(scope="module")
def reference(on_one_node, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    on_one_node(folder)
    return folder


def free_port(first: int) -> int:
    for port in range(first, first + 9999):
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no free port")


def environment(**more) -> dict[str, str]:
    """`dar` and `torchrun` of this interpreter, and this module for its callback."""
    words = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    words["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return os.environ | words | {name: str(value) for name, value in more.items()}


def test_slurm_requeues_and_what_it_saves_is_resumed(tokens, on_one_node, reference, tmp_path):
    tools, run_folder, step, log = (tmp_path / name for name in ("bin", "run", "step", "scontrol.log"))
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    job = free_port(15000) - 15000  # Lightning makes the port from it
    variables = environment(SLURM_JOB_ID=job, SLURM_NTASKS=2, SLURM_NNODES=2, SLURM_NTASKS_PER_NODE=1)
    variables |= {"SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "dar", "SCONTROL_LOG": str(log)}
    variables["PATH"] = f"{tools}:{variables['PATH']}"
    slow = [f"--trainer.callbacks+={__name__}.Slow", f"--trainer.callbacks.file={step}"]
    slow.append("--data.init_args.num_workers=1")  # srun's signal reaches workers, too
    command = ["bash", SCRIPTS / "slurm.sh", *arguments(tokens, run_folder), *slow]
    job_script = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not step.is_file() or int(step.read_text() or 0) < 5:
        assert time.monotonic() < deadline
        assert job_script.poll() is None
        time.sleep(0.02)
    job_script.send_signal(signal.SIGUSR1)
    assert job_script.wait(SECONDS) > 128
    assert log.read_text() == f"requeue {job}\n"
    assert 5 < last(run_folder)["global_step"] < STEPS
    assert list(run_folder.rglob("hpc_ckpt_*")) == []
    on_one_node(run_folder)
    check(run_folder, reference)


def test_torchrun_on_two_nodes(tokens, reference, tmp_path):
    """One of two ranks dies: both start again, from the last checkpoint."""
    run_folder, died = tmp_path / "run", tmp_path / "died"
    dies = [f"--trainer.callbacks+={__name__}.DiesOnce", f"--trainer.callbacks.file={died}"]
    head = f"127.0.0.1:{free_port(29400)}"
    nodes, logs = [], [tmp_path / f"node{node}.log" for node in range(2)]
    try:
        for node, log in enumerate(logs):
            variables = environment(NODE=node, NODES=2, GPUS=1, HEAD=head, ADDRESS="127.0.0.1", RESTARTS=1)
            command = ["bash", SCRIPTS / "torchrun.sh", *arguments(tokens, run_folder, every=4), *dies]
            with log.open("w") as errors:
                nodes.append(subprocess.Popen(command, env=variables, stderr=errors, start_new_session=True))
        deadline = time.monotonic() + SECONDS
        while any(node.poll() is None for node in nodes) and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    errors = [log.read_text() for log in logs]
    assert [node.wait() for node in nodes] == [0, 0], "\n".join(errors)
    assert died.is_file()
    assert any("Restored all states from the checkpoint" in text for text in errors)  # rank 0 says it
    check(run_folder, reference)
