"""A real SLURM on this machine: four nodes on loopback, see slurm_local.sh."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")
SECONDS = 180  # what does not happen within these fails its test


class Slurm:
    """A SLURM of four nodes, node1 to node4, in the folder `root`."""

    def __init__(self, root: Path, programs: Path) -> None:
        """`programs`: a folder of PATH, for its jobs."""
        self.root = root
        self.environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] = f"{programs}:{os.environ['PATH']}"

    def start(self) -> None:
        self._call("start", str(free_ports(5)), "4")

    def _call(self, verb: str, *words: str) -> None:
        subprocess.run([HERE / "slurm_local.sh", verb, self.root, *words], check=True)

    def ask(self, *words: str) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            list(map(str, words)), env=self.environment, cwd=self.root, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str | Path, **variables: str) -> str:
        """sbatch; the job's number."""
        named = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
        return self.ask("sbatch", "--parsable", f"--export={named}", *words).strip()

    def state(self, job: str) -> dict[str, str]:
        """Of `scontrol show job`."""
        shown = self.ask("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def log(self, job: str) -> str:
        path = self.root / f"slurm-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < deadline, f"{self.ask('scontrol', 'show', 'job', job)}\n{self.log(job)}"
            time.sleep(0.1)

    def wait_for_pause(self, job: str, folder: Path, start: int, tasks: int = 1) -> None:
        """Until all tasks of a run's n-th start are where Pause holds them."""
        self.wait(job, lambda: len(list(folder.glob(f"{start}.*"))) == tasks)

    def wait_for_end(self, job: str) -> tuple[str, str, int]:
        """Until a job is over: its state, exit code:signal, and how often it was put back."""
        self.wait(job, lambda: self.state(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
        state = self.state(job)
        return state["JobState"], state["ExitCode"], int(state["Restarts"])

    def cut_power(self, node: int) -> None:
        """Kill all that runs on a node; when SLURM has missed it, it comes up again, empty."""
        os.kill(int((self.root / f"node{node}.pid").read_text()), signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while "down" not in self.ask("sinfo", "-h", "-o", "%t", "-n", f"node{node}", "-p", "main"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        self._call("node", str(node))

    def stop(self) -> None:
        self._call("stop")


def reason_against() -> str | None:
    """Why this machine cannot run it."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        return f"no SLURM here, {missing[0]} is missing (Debian: make ci-tools)"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"SLURM's nodes need namespaces: {tried.stderr.strip()}" if tried.returncode else None


def free_ports(number: int) -> int:
    """The first of several."""
    for port in range(17000 + 10 * (os.getpid() % 500), 32000, 10):
        with_listeners = [one for one in range(port, port + number) if _answers(one)]
        if not with_listeners:
            return port
    raise RuntimeError("no free ports")


def _answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
