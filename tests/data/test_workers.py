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

in_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")

# A run: says who its worker and the worker's parent are, and stands still. A child that is forked from it, as with
# Lightning's `ddp_notebook` after a look at one batch, has workers, too.
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
    if os.fork() == 0:
        print([int(number) for number in DataLoader(range(3), batch_size=None, **options(1))], flush=True)
        sys.exit()
    os.wait()
    sys.stdin.readline()
"""


@pytest.fixture
def images(tmp_path) -> str:
    return write_images(tmp_path, 22)


@pytest.fixture
def run(tmp_path):
    """In a folder whose modules would be the wrong ones."""
    for name in ("dar_lightning", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "dar"  # for which the server does not import Lightning, as for scripts of others
    script.write_text(RUN)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, **pipes) as process:
        yield process
        process.kill()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def go_on(run) -> str:
    run.stdin.write("\n")
    run.stdin.flush()
    return run.stdout.readline().strip()


@in_proc
def test_a_run_its_server_and_its_worker(run):
    """Signals to the whole group leave worker and server at work; both end with a run that is killed."""
    worker, server = map(int, run.stdout.readline().split())
    assert server != run.pid, "not a fork of the run"
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(run.pid, number)
    for pid in (worker, server):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert go_on(run) == "4 True"
    assert go_on(run) == "[0, 1, 2]"
    assert is_there(worker)
    assert is_there(server)
    run.kill()
    deadline = time.monotonic() + 60
    while is_there(worker) or is_there(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Variables(torch.utils.data.Dataset):
    """The environment where the item is made."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, item: int) -> dict[str, str]:
        return dict(os.environ)


def test_workers_have_the_environment_of_the_run_as_it_is_now(monkeypatch):
    """The server has that of the moment in which it started: a key for S3 may have come later."""
    monkeypatch.delenv("PATH")  # the server has it
    for value in ("one", "two"):
        monkeypatch.setenv("DAR_TEST_VARIABLE", value)
        loader = torch.utils.data.DataLoader(Variables(), batch_size=None, **options(1))
        assert list(loader) == [dict(os.environ)]


def test_workers_obey_only_the_run(images):
    """What another process sends is ignored, what the run sends ends it; a dead worker is a line in the next epoch."""
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
    with pytest.raises(UserError, match=r"^num_workers: DataLoader worker .* num_workers=0 may show why"):
        list(loader)


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
