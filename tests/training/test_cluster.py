"""The cluster's scripts: two nodes of torchrun end with the bits of two processes on one node; what slurm.sh decides.

tests/cluster runs slurm.sh on a real SLURM, where there is one.
"""

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

# In the places of SLURM's commands, and of a `dar` that ends as it is told, or waits for the notice and saves. This
# srun starts a task for each word of END; one that ends badly ends the others, and the highest code is srun's.
PROGRAMS = {
    "srun": """shift; [[ "$END" = *" "* ]] || exec "$@"
        for end in $END; do END=$end "$@" & tasks+=($!); done
        wait -n || kill -TERM "${tasks[@]}" 2>/dev/null
        for task in "${tasks[@]}"; do wait "$task"; codes+="$?\n"; done
        exit "$(printf "$codes" | sort -n | tail -n 1)"
    """,
    "scontrol": '[ "$1" = show ] && echo "PreemptTime=$PREEMPTED" || echo "$@"',
    "dar": """trap "exit $NOTICED" USR1; trap "exit 143" TERM; touch "$BEGUN"
        [ "${END#waits}" ] && exit "$END"; while :; do sleep 0.02; done
    """,
}


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
def reference(tokens, two_ranks, tmp_path_factory) -> Path:
    """Trained with two processes on one node, without a break."""
    folder = tmp_path_factory.mktemp("reference")
    two_ranks(main, ["fit", *arguments(tokens, folder), "--trainer.devices=2"])
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


@pytest.mark.parametrize(
    ("end", "preempted", "soonest", "status", "said"),
    [
        ("138 after the notice", "None", "0", 138, "requeue 7\n"),  # saved, put back
        ("137 after the notice", "None", "60", 137, ""),  # that is another fault
        ("138 after the notice", "None", "60", 2, "slurm.sh: not put back: the notice of the time limit came 0 s"),
        ("143", "2026-01-01T00:00:00", "60", 143, "requeue 7\n"),
        ("143", "None", "60", 143, ""),  # scancel
        ("0", "2026-01-01T00:00:00", "60", 0, ""),
        ("2", "2026-01-01T00:00:00", "60", 2, ""),
        ("1", "2026-01-01T00:00:00", "60", 1, ""),  # a fault of all tasks
        ("1 waits", "None", "60", 143, ""),  # of one, for which srun ends the other
    ],
)
def test_what_slurm_puts_back(end, preempted, soonest, status, said, tmp_path):
    end, _, notice = end.partition(" after the ")
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(SLURM_JOB_ID=7, SLURM_NNODES=1, SLURM_NTASKS_PER_NODE=1, SOONEST=soonest)
    variables |= {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "END": "" if notice else end,
        "NOTICED": end,
        "PREEMPTED": preempted,
    }
    command = ["bash", SCRIPTS / "slurm.sh", "--seed_everything=1"]
    variables["BEGUN"] = str(tmp_path / "begun")
    job = subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while notice and not (tmp_path / "begun").exists():
        assert job.poll() is None
        time.sleep(0.02)
    if notice:
        job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == status
    assert output.startswith(said)
    assert bool(output) == bool(said)


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
