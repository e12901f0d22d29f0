"""Workers of the loaders: none is a fork of the run, they obey only the run, and they end with it."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import SIZE, write_images, write_tokens

from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.loader import Loader
from dar_lightning.data.views import ViewBatches, Views
from dar_lightning.data.workers import options
from dar_lightning.errors import UserError

# A run: says who its worker and the worker's parent are, and stands still.
RUN = """
import multiprocessing, os, signal, sys
if __name__ == "__main__":
    from dar_lightning.data.workers import options
    from torch.utils.data import DataLoader
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    loader = DataLoader(range(20), batch_size=4, **options(1))
    os.killpg(0, signal.SIGUSR1)  # while the server starts
    batches = iter(loader)
    next(batches)
    worker, = multiprocessing.active_children()
    server = int(open(f"/proc/{worker.pid}/stat").read().rsplit(")", 1)[1].split()[1])
    print(worker.pid, server, flush=True)
    sys.stdin.readline()
    print(len([next(batches) for _ in range(4)]), worker.is_alive(), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def images(tmp_path) -> str:
    return write_images(tmp_path, 22)


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "dar"  # for which the server does not import Lightning, as it does for scripts of others
    script.write_text(RUN)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, script], **pipes) as process:
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


class Variables(torch.utils.data.Dataset):
    """The environment where the item is made."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, item: int) -> dict[str, str]:
        return dict(os.environ)


def test_workers_have_the_environment_of_the_run_as_it_is_now(monkeypatch):
    """The server has that of the moment in which it started: a key for S3 may have come later."""
    for value in ("one", "two"):
        monkeypatch.setenv("DAR_TEST_VARIABLE", value)
        loader = torch.utils.data.DataLoader(Variables(), batch_size=None, **options(1))
        assert list(loader) == [dict(os.environ)]
    monkeypatch.delenv("PATH")  # the server has it
    assert "PATH" not in next(iter(torch.utils.data.DataLoader(Variables(), batch_size=None, **options(1))))


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


def test_what_workers_are_sent_needs_no_lightning(images, tmp_path):
    data = ImageNetDataModule(images, images, image_size=SIZE, batch_size=4, num_workers=1)
    codes = CodesDataModule(write_tokens(tmp_path / "codes", 8), batch_size=4, num_workers=1)
    loaders = [data.train_dataloader(), data.val_dataloader(), codes.train_dataloader()]
    loaders.append(Loader(ViewBatches(data.index("train"), [0], Views("center", 1, SIZE, 0), 2), **options(1)))
    sent = [(loader.dataset, loader.worker_init_fn, loader.collate_fn) for loader in loaders]
    (tmp_path / "sent").write_bytes(pickle.dumps(sent))
    code = (
        "import pickle, sys\n"
        "datasets = [sent[0] for sent in pickle.load(open(sys.argv[1], 'rb'))]\n"
        "print(len([dataset[0] for dataset in datasets]))\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    words = [sys.executable, "-c", code, tmp_path / "sent"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.split() == ["4", "[]"]


def test_the_server_imports_the_package_of_the_run(tmp_path):
    """And not another one that lies in the current folder."""
    for name in ("dar_lightning", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "run.py"
    script.write_text(RUN)
    words = [sys.executable, script]
    run = subprocess.run(words, input="\n\n", capture_output=True, text=True, cwd=tmp_path, start_new_session=True)
    assert run.stdout.splitlines()[1] == "4 True"
    assert "the wrong one" not in run.stderr


FORKS = """
import os, sys
if __name__ == "__main__":
    from dar_lightning.data.workers import options
    from torch.utils.data import DataLoader
    numbers = lambda: [int(number) for number in DataLoader(range(3), batch_size=None, **options(1))]
    assert numbers() == [0, 1, 2]
    child = os.fork()
    assert numbers() == [0, 1, 2]
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_fork_of_a_run_has_workers_too(tmp_path):
    """As with Lightning's `ddp_notebook`, after a look at one batch."""
    script = tmp_path / "dar"
    script.write_text(FORKS)
    subprocess.run([sys.executable, script], check=True, timeout=120)


def test_a_worker_that_dies_between_two_epochs(images):
    data = ImageNetDataModule(images, image_size=SIZE, batch_size=4, num_workers=1)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(list(loader)) == 5
    (worker,) = loader._iterator._workers
    worker.kill()
    worker.join(20)
    with pytest.raises(UserError, match=r"^num_workers: DataLoader worker .* is there enough memory for 1\?"):
        list(loader)
