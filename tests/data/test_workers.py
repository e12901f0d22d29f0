"""Workers of the loaders: none is a fork of the run, they obey only the run, and they end with it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import SIZE, write_images

from dar_lightning.data.imagenet import ImageNetDataModule

# A run: says who its worker and the worker's parent are, and stands still.
RUN = """
import multiprocessing, signal, sys
if __name__ == "__main__":
    from dar_lightning.data.imagenet import ImageNetDataModule
    data = ImageNetDataModule(sys.argv[1], image_size=8, batch_size=4, num_workers=1)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    worker, = multiprocessing.active_children()
    server = int(open(f"/proc/{worker.pid}/stat").read().rsplit(")", 1)[1].split()[1])
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    print(worker.pid, server, flush=True)
    sys.stdin.readline()
    print(len(list(batches)), worker.is_alive(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def images(tmp_path) -> str:
    return write_images(tmp_path, 22)


@pytest.fixture
def run(images, tmp_path):
    script = tmp_path / "run"
    script.write_text(RUN)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, script, images], **pipes) as process:
        yield process
        process.kill()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_signals_to_the_whole_group_leave_worker_and_server_at_work(run):
    worker, server = map(int, run.stdout.readline().split())
    assert server != run.pid, "not a fork of the run"
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(run.pid, number)
    for pid in (worker, server):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.5)
    run.stdin.write("\n")
    run.stdin.flush()
    assert run.stdout.readline().split() == ["4", "True"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_with_a_run_that_is_killed(run):
    pids = [int(word) for word in run.stdout.readline().split()]
    assert all(is_there(pid) for pid in pids)
    run.kill()
    deadline = time.monotonic() + 60
    while any(is_there(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_obey_only_the_run(images):
    data = ImageNetDataModule(images, image_size=SIZE, batch_size=4, num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    others = {*multiprocessing.active_children()}  # of loaders in other tests that nobody has collected yet
    batches = iter(loader)
    next(batches)
    (worker,) = {*multiprocessing.active_children()} - others
    for name in ("-TERM", "-INT"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)  # a process of its own, as a cluster's daemon
        time.sleep(0.2)
    assert len(list(batches)) == 4
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    assert worker.exitcode == 0


def test_what_workers_import_has_no_lightning():
    code = (
        "import sys, importlib\n"
        "from dar_lightning.data import workers\n"
        "[importlib.import_module(name) for name in workers.IMPORTS]\n"
        "print([name for name in sys.modules if name.split('.')[0].endswith('lightning')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'lightning" not in run.stdout
    assert "dar_lightning.data.shard_dataset" in run.stdout
