"""Training processes die by SIGKILL and are started again: they see what a run sees that nobody killed."""

import json
import os
import shutil
import signal
import tarfile
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from killable import run
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_shards import sample

from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.token_dataset import CodesDataset, CodesIndex, describe, write_codes
from dar_lightning.training.callbacks import LastStepCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and loggers
STEPS, BATCH = 15, 4  # 26 samples in global batches of 4: step 6 begins the second epoch, step 12 the third
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Diary(L.LightningModule):
    """Trains nothing; writes down every sample, and dies where it is told to."""

    def __init__(self, diary: Path, dies_at: int | None = None, while_saving: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.diary, self.dies_at, self.while_saving = diary, dies_at, while_saving

    def training_step(self, batch, batch_idx):
        what = batch["image"] if "image" in batch else batch["codes"]
        sums = [zlib.crc32(sample.numpy().tobytes()) for sample in what]
        samples = list(zip(batch["key"], batch["label"].tolist(), sums, strict=True))
        with open(f"{self.diary}.{self.global_rank}", "a") as file:
            print(json.dumps([self.global_step, samples]), file=file)
        self._die(while_saving=False)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        keys = [key for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]
        with open(f"{self.diary}.{self.global_rank}.val", "a") as file:
            print(*keys, file=file)

    def on_save_checkpoint(self, checkpoint):
        self._die(while_saving=True)

    def _die(self, while_saving: bool) -> None:
        last = self.global_rank == self.trainer.world_size - 1
        if last and self.global_step == self.dies_at and while_saving == self.while_saving:
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, source, root: Path, world=1, name="diary", dies_at=None, while_saving=False, val=False, **options):
    """What a user would start, and start again after it died."""
    root.mkdir(exist_ok=True)
    options = {"batch_size": BATCH // world, "seed": 3, "val": str(source) if val else None} | options
    trainer = L.Trainer(
        default_root_dir=root,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=STEPS,
        num_sanity_val_steps=0,
        callbacks=[LastStepCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=2, save_top_k=0)],
        **QUIET,
    )
    module = data(str(source), **options)
    trainer.fit(Diary(root / name, dies_at, while_saving), datamodule=module, ckpt_path="last")
    return module.skipped if data is ImageNetDataModule else None


def diary(path: Path) -> list[tuple[int, list]]:
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


def check(whole: dict[int, list], root: Path, worlds: list[int]) -> None:
    """Every line of every attempt is in its place in the unbroken run, and all its steps were done on all ranks."""
    done: set[int] = set()
    for attempt, world in enumerate(worlds):
        ranks = [diary(root / f"attempt{attempt}.{rank}") for rank in range(world)]
        for rank, lines in enumerate(ranks):
            part = BATCH // world
            for step, samples in lines:
                assert samples == whole[step][rank * part : (rank + 1) * part], (attempt, rank, step)
            steps = [step for step, _ in lines]
            assert steps == list(range(steps[0], steps[0] + len(steps)))
            assert steps[0] == (max(done) // 2 * 2 if done else 0), "it goes on with the last checkpoint"
        done |= set.intersection(*({step for step, _ in lines} for lines in ranks))
    assert done == set(range(STEPS))


@pytest.fixture(scope="module")
def damaged(shards, tmp_path_factory) -> tuple[Path, list[int]]:
    """What is left of the 26 pictures: sample 4 breaks off, and the second shard behind its first pictures."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(shards, folder)
    first, second, _ = sorted(folder.glob("*.tar"))
    png = sample(4)[1]["png"]
    first.write_bytes(first.read_bytes().replace(png, png[:500] + bytes(len(png) - 500)))
    cut = second.stat().st_size // 3
    with tarfile.open(second) as tar:
        lost = {member.name.partition(".")[0] for member in tar if member.offset_data + member.size > cut}
    os.truncate(second, cut)
    return folder, [number for number in range(26) if number != 4 and f"photo-{number:03d}" not in lost]


def of_images(damaged: Path, root: Path, **options) -> dict:
    return train(ImageNetDataModule, damaged, root, image_size=16, max_bad_share=0.5, **options)


@pytest.fixture(scope="module")
def whole(damaged, tmp_path_factory) -> dict[int, list]:
    """What the unbroken run saw at each step: of every sample its key, label and sum of pixels."""
    root, (folder, good) = tmp_path_factory.mktemp("whole"), damaged
    of_images(folder, root)
    whole = dict(diary(root / "diary.0"))
    assert list(whole) == list(range(STEPS))
    keys = [key for step in range(6) for key, _, _ in whole[step]]
    assert len(keys) == 24
    assert len(set(keys)) > 12
    assert set(keys) <= {f"photo-{number:03d}" for number in good}
    assert [key for key, _, _ in whole[6]] != [key for key, _, _ in whole[0]]
    return whole


# One entry per start: where it dies. A checkpoint is written after every second step, so a death in step 5 takes up
# again at 4; one in step 6 at the edge of an epoch; "saving 8" repeats from 6.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("worlds", "workers", "deaths"),
    [
        ([1, 1, 1], 0, [6, "saving 8"]),
        ([2, 1, 2], 1, [5, 11]),  # the global batch stays, so the order does
    ],
    ids=str,
)
def test_images(damaged, whole, tmp_path, worlds, workers, deaths):
    for attempt, (world, death) in enumerate(zip(worlds, [*deaths, None], strict=True)):
        options = {"name": f"attempt{attempt}", "world": world, "num_workers": workers}
        if death is not None:
            options |= {"dies_at": int(str(death).split()[-1]), "while_saving": "saving" in str(death)}
        codes = run(_train_images, damaged[0], tmp_path, options, world=world)
        assert codes[-1] == (0 if death is None else -signal.SIGKILL)
        assert all(codes) == any(codes)
    check(whole, tmp_path, worlds)


def _train_images(folder, root, options) -> None:
    of_images(folder, root, **options)


def _two_ranks_of_images(folder, root):
    return of_images(folder, root, world=2, name="attempt0", val=True)


def test_two_ranks_see_what_one_sees(pair, damaged, whole, tmp_path):
    """Bad samples and their replacements, too; in validation, each good sample on one rank only."""
    folder, good = damaged
    skipped = pair(_two_ranks_of_images, folder, tmp_path)
    check(whole, tmp_path, [2])
    validated = [key for rank in range(2) for key in (tmp_path / f"attempt0.{rank}.val").read_text().split()]
    assert sorted(validated) == sorted(2 * [f"photo-{number:03d}" for number in good])  # in two epochs
    assert all(len(found["val"]) > 0 for found in skipped)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """26 images in three token shards, four crops of each."""
    root = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    entries = []
    for number, size in enumerate((10, 9, 7)):
        codes = generator.integers(0, 300, (size, 4, 8)).astype(np.uint16)
        path = root / f"{number:06d}.safetensors"
        write_codes(path, codes, np.arange(size), [f"{number}-{row}" for row in range(size)], {})
        entries.append(describe(path, size))
    CodesIndex(root, "0" * 64, {}, "random", 4, 32, 8, 300, tuple("abcdefghij"), tuple(entries)).save()
    return root


def _two_ranks_of_codes(tokens, root):
    return train(CodesDataModule, tokens, root, world=2, name="attempt0")


def test_codes_on_two_ranks(pair, tokens, tmp_path):
    train(CodesDataModule, tokens, tmp_path / "whole")
    assert pair(_two_ranks_of_codes, tokens, tmp_path) == [None, None]
    check(dict(diary(tmp_path / "whole" / "diary.0")), tmp_path, [2])


@pytest.mark.parametrize("what", ["images", "codes"])
def test_resuming_late_reads_no_more_than_resuming_early(shards, tokens, tmp_path, monkeypatch, what):
    data, source, reader, name = {
        "images": (ImageNetDataModule, shards, ShardReader, "read"),
        "codes": (CodesDataModule, tokens, CodesDataset, "__getitem__"),
    }[what]
    reads, read = [], getattr(reader, name)

    def counted(self, number, **options):
        reads.append(number)
        return read(self, number, **options)

    monkeypatch.setattr(reader, name, counted)

    def fit(ckpt_path=None, **options):
        trainer = L.Trainer(default_root_dir=tmp_path, **QUIET, **options)
        trainer.fit(Diary(tmp_path / "diary"), datamodule=data(str(source), batch_size=BATCH), ckpt_path=ckpt_path)

    fit(max_steps=32, callbacks=[ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)])
    assert len(reads) >= 32 * BATCH
    counts = []
    for step in (2, 32):  # both are the third of an epoch
        reads.clear()
        fit(ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=step + 3, enable_checkpointing=False)
        counts.append(len(reads))
    assert counts[0] == counts[1] <= (3 + 1) * BATCH  # one batch is fetched ahead
