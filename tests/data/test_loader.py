"""Loaders under a Trainer that is stopped and resumed, on one rank and on two: the same samples. And workers."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from recorder import QUIET, Recorder, fit
from tiny_models import SIZE, write_images, write_tokens
from tiny_shards import module, sample
from torch.utils.data import Dataset

from dar_lightning.data import workers
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.loader import Loader
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.views import ViewBatches, Views
from dar_lightning.data.workers import options
from dar_lightning.errors import UserError

STEPS, BATCH = 15, 4  # 26 samples: step 6 begins the second epoch, step 12 the third


def photos(folder: Path, **options) -> ImageNetDataModule:
    return module(folder, max_bad_share=0.5, **options)


def every_step(root: Path, **options) -> ModelCheckpoint:
    return ModelCheckpoint(root, "{step}", save_top_k=-1, **options)


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory) -> tuple[Path, list[str]]:
    """The 26 pictures, of which one breaks off and some are lost with a shard's end; and the keys of the good ones."""
    folder = shutil.copytree(shards, tmp_path_factory.mktemp("damaged") / "shards")
    first, second, _ = sorted(folder.glob("*.tar"))
    png = sample(4)[1]["png"]
    first.write_bytes(first.read_bytes().replace(png, png[:500] + bytes(len(png) - 500)))
    cut = second.stat().st_size // 3
    with tarfile.open(second) as tar:
        lost = {member.name.partition(".")[0] for member in tar if member.offset_data + member.size > cut}
    os.truncate(second, cut)
    keys = [f"photo-{number:03d}" for number in range(26) if number != 4]
    return folder, [key for key in keys if key not in lost]


@pytest.fixture(scope="module")
def whole(damaged, tmp_path_factory) -> tuple[list, Path]:
    """What an unbroken run sees, and its checkpoints."""
    root, (folder, good) = tmp_path_factory.mktemp("whole"), damaged
    model = fit(photos(folder), callbacks=[every_step(root, every_n_train_steps=1)], max_steps=STEPS)
    assert [len(batch) for batch in model.seen] == [BATCH] * STEPS
    first, second = ([sample for batch in model.seen[start : start + 6] for sample in batch] for start in (0, 6))
    keys = [key for key, _, _ in first]
    assert set(keys) <= set(good)
    assert len(set(keys)) > 12
    assert keys != [key for key, _, _ in second]
    pixels = [{key: checksum for key, _, checksum in samples} for samples in (first, second)]
    assert sum(pixels[0][key] == pixels[1].get(key) for key in pixels[0]) < 3, "other crops in another epoch"
    assert all(label == int(key[-3:]) % 4 for key, label, _ in first)
    assert model.validated == 2 * good
    return model.seen, root


@pytest.mark.parametrize(("stop", "options"), [(1, {"num_workers": 2}), (6, {}), (8, {})], ids=str)
def test_resume_from_a_step_checkpoint(damaged, whole, stop, options):
    """Step 6 is at the edge of an epoch; the number of workers may be another."""
    seen, root = whole
    resumed = fit(photos(damaged[0], **options), ckpt_path=root / f"step={stop}.ckpt", max_steps=STEPS)
    assert resumed.seen == seen[stop:]


@pytest.mark.parametrize(
    ("name", "when", "options", "stops"),
    [
        ("epoch", {"save_on_train_epoch_end": True}, {"max_epochs": 3}, {0: 6, 1: 12}),
        ("epoch", {"save_on_train_epoch_end": True}, {"max_epochs": 3, "limit_train_batches": 4}, {0: 4, 1: 8}),
        ("step", {}, {"max_steps": 14, "val_check_interval": 3}, {3: 3, 6: 6}),
    ],
    ids=["epochs", "limited epochs", "validation in mid-epoch"],
)
def test_resume_from_other_checkpoints(shards, tmp_path, name, when, options, stops):
    checkpoint = ModelCheckpoint(tmp_path, f"{{{name}}}", save_top_k=-1, **when)
    whole = fit(module(shards), callbacks=[checkpoint], **options)
    for number, stop in stops.items():
        resumed = fit(module(shards), ckpt_path=tmp_path / f"{name}={number}.ckpt", **options)
        assert resumed.seen == whole.seen[stop:]


class Failing(Recorder):
    def training_step(self, batch, batch_idx):
        if len(self.seen) == 8:
            raise RuntimeError("preempted")
        return super().training_step(batch, batch_idx)


class SaveOnException(L.Callback):
    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "exception.ckpt")


def test_resume_from_the_middle_of_a_step(damaged, whole, tmp_path):
    """A step that failed after its batch was fetched is done again."""
    with pytest.raises(RuntimeError, match="preempted"):
        fit(photos(damaged[0]), Failing(), callbacks=[SaveOnException()], max_steps=STEPS, default_root_dir=tmp_path)
    resumed = fit(photos(damaged[0]), ckpt_path=tmp_path / "exception.ckpt", max_steps=STEPS)
    assert resumed.seen == whole[0][8:]


class Late(SingleDeviceStrategy):
    restore_checkpoint_after_setup = True


class Scheduled(Recorder):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == STEPS
        return super().configure_optimizers()


def test_resume_of_a_strategy_that_restores_late(damaged, whole):
    """FSDP reads the checkpoint when the loaders, whose length the learning rate's schedule needs, are there."""
    options = {"strategy": Late(torch.device("cpu")), "max_steps": STEPS, "max_epochs": 9}
    resumed = fit(photos(damaged[0]), Scheduled(), ckpt_path=whole[1] / "step=8.ckpt", **options)
    assert resumed.seen == whole[0][8:]


def test_loaders_made_anew(damaged, whole):
    """They go on in one training; a second training is one of its own, and validation may have another seed."""
    data = photos(damaged[0])
    for _ in range(2):
        assert fit(data, max_steps=STEPS, reload_dataloaders_every_n_epochs=1).seen == whole[0]
    L.Trainer(**QUIET).validate(Recorder(), photos(damaged[0], seed=4), ckpt_path=whole[1] / "step=2.ckpt")


def test_overfit_repeats_the_same_batches(shards):
    seen = fit(module(shards), overfit_batches=2, max_epochs=3).seen
    assert seen[:2] == seen[2:4] == seen[4:]


def test_predict_has_every_sample_in_order(shards):
    batches = L.Trainer(**QUIET).predict(Recorder(), datamodule=module(shards, num_workers=1))
    assert [key for keys in batches for key in keys] == [f"photo-{number:03d}" for number in range(26)]


def rank(folder: Path, steps: int, root: Path, **options) -> tuple[list, list[str], bool]:
    """What a rank of two sees, with half the batch size, and whether it knows of bad samples."""
    data, checkpoint = photos(folder, batch_size=BATCH // 2), every_step(root, every_n_train_steps=steps)
    model = fit(data, callbacks=[checkpoint], devices=2, strategy="ddp", max_steps=steps, **options)
    return model.seen, model.validated, bool(data.skipped["val"])


def test_the_number_of_ranks_may_change(pair, damaged, whole, tmp_path):
    """Two ranks, one, and two again see what one has seen; in validation, each good sample is on one rank only."""
    folder, good = damaged
    begun = pair(rank, folder, 5, tmp_path)
    checkpoint = every_step(tmp_path, every_n_train_steps=11)
    middle = fit(photos(folder), ckpt_path=tmp_path / "step=5.ckpt", max_steps=11, callbacks=[checkpoint])
    ended = pair(partial(rank, ckpt_path=tmp_path / "step=11.ckpt"), folder, STEPS, tmp_path)
    both = [
        [[*one, *other] for one, other in zip(first[0], second[0], strict=True)] for first, second in (begun, ended)
    ]
    assert [*both[0], *middle.seen, *both[1]] == whole[0]
    (_, one, knows), (_, other, too) = ended
    assert sorted(one + other) == good  # once, in the epoch that ends
    assert (len(one) < len(good), knows, too) == (True, True, True)


def test_resuming_late_reads_no_more_than_resuming_early(shards, tmp_path, monkeypatch):
    reads, read = [], ShardReader.read

    def counted(self, number, **options):
        reads.append(number)
        return read(self, number, **options)

    monkeypatch.setattr(ShardReader, "read", counted)
    checkpoint = every_step(tmp_path, every_n_train_steps=2)
    fit(ImageNetDataModule(str(shards), image_size=16, batch_size=BATCH), callbacks=[checkpoint], max_steps=32)
    assert len(reads) >= 32 * BATCH
    counts = []
    for step in (2, 32):  # both are the third of an epoch
        reads.clear()
        data = ImageNetDataModule(str(shards), image_size=16, batch_size=BATCH)
        fit(data, ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=step + 3)
        counts.append(len(reads))
    assert counts[0] == counts[1] <= (3 + 1) * BATCH  # one batch is fetched ahead


class Dying(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os._exit(3)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"^num_workers: DataLoader worker .*; num_workers=0 may show why[^\n]*$"):
        list(Loader(Dying(), **workers.options(num_workers=1)))


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
