"""Workers of the loaders: none is a fork of the run, they obey only the run, and they end with it."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import SIZE, write_images, write_tokens

from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.loader import Loader
from dar_lightning.data.views import ViewBatches, Views
from dar_lightning.data.workers import options

# A run: says who its worker and the worker's parent are, and what of Lightning the datasets of a file bring into the
# worker; stands still. A child that is forked from it, as with Lightning's `ddp_notebook`, has workers, too. It ends
# its worker; the next one has its environment of now: a key for S3 may have come later.
RUN = """
import multiprocessing, os, pickle, signal, sys
class Probe:
    def __len__(self):
        return 20
    def __getitem__(self, item):
        with open(sys.argv[1], "rb") as file:
            assert len([loaded[0][0] for loaded in pickle.load(file)]) == 4
        modules = [name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning")]
        return modules, dict(os.environ)
if __name__ == "__main__":
    from dar_lightning.data.workers import options
    from torch.utils.data import DataLoader
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    loader = DataLoader(Probe(), batch_size=None, **options(1))
    os.killpg(0, signal.SIGUSR1)  # while the server starts
    batches = iter(loader)
    modules, _ = next(batches)
    worker, = multiprocessing.active_children()
    server = int(open(f"/proc/{worker.pid}/stat").read().rsplit(")", 1)[1].split()[1])
    print(worker.pid, server, len(modules), flush=True)
    sys.stdin.readline()
    print(len([next(batches) for _ in range(4)]), worker.is_alive(), flush=True)
    sys.stdin.readline()
    if os.fork() == 0:
        print([int(number) for number in DataLoader(range(3), batch_size=None, **options(1))], flush=True)
        sys.exit()
    os.wait()
    sys.stdin.readline()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    print(worker.exitcode, flush=True)
    os.environ["LATER"] = os.environ.pop("PATH")
    another = iter(DataLoader(Probe(), batch_size=None, **options(1)))
    worker, = multiprocessing.active_children()
    print(worker.pid, next(another)[1] == dict(os.environ), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def run(tmp_path):
    """In a folder whose modules would be the wrong ones."""
    images = write_images(tmp_path / "images", 22)
    data = ImageNetDataModule(images, images, image_size=SIZE, batch_size=4)
    codes = CodesDataModule(write_tokens(tmp_path / "codes", 8), batch_size=4)
    loaders = [data.train_dataloader(), data.val_dataloader(), codes.train_dataloader()]
    loaders.append(Loader(ViewBatches(data.index("train"), [0], Views("center", 1, SIZE, 0), 2), **options(0)))
    for loader in loaders:
        loader.dataset[0]  # files that it has open stay behind
    sent = [(loader.dataset, loader.worker_init_fn, loader.collate_fn) for loader in loaders]
    (tmp_path / "sent").write_bytes(pickle.dumps(sent))
    for name in ("dar_lightning", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "dar"  # for which the server does not import Lightning, as for scripts of others
    script.write_text(RUN)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, script, tmp_path / "sent"], cwd=tmp_path, **pipes) as process:
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_run_its_server_and_its_worker(run):
    """Worker and server obey none but the run, and end with it, also if it is killed; they do without Lightning."""
    worker, server, of_lightning = map(int, run.stdout.readline().split())
    assert server != run.pid, "not a fork of the run"
    assert of_lightning == 0
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(run.pid, number)
    for pid in (worker, server):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert go_on(run) == "4 True"
    assert go_on(run) == "[0, 1, 2]"
    assert is_there(worker)
    assert is_there(server)
    assert go_on(run) == "0", "what the run sends ends it"
    worker, has_the_environment = run.stdout.readline().split()
    assert has_the_environment == "True"
    worker = int(worker)
    run.kill()
    deadline = time.monotonic() + 60
    while is_there(worker) or is_there(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
