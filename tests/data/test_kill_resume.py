"""Training processes die by SIGKILL and are started again: they see what a run sees that nobody killed."""

import json
import os
import signal
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from killable import run
from lightning.pytorch.callbacks import ModelCheckpoint

from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.token_dataset import CodesDataset, CodesIndex, describe, write_codes
from dar_lightning.errors import UserError
from dar_lightning.training.callbacks import LastStepCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and loggers
STEPS, EPOCH, BATCH = 15, 6, 4  # 26 samples in global batches of 4: step 6 begins the second epoch, step 12 the third


class Recorder(L.LightningModule):
    """Trains nothing; keeps a diary of every sample, and dies where it is told to."""

    def __init__(self, diary: Path, dies_at: int | None, while_saving: bool) -> None:
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

    def on_save_checkpoint(self, checkpoint):
        self._die(while_saving=True)

    def _die(self, while_saving: bool) -> None:
        last = self.global_rank == self.trainer.world_size - 1
        if last and self.global_step == self.dies_at and while_saving == self.while_saving:
            os.kill(os.getpid(), signal.SIGKILL)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, source, root: Path, world=1, workers=0, name="diary", dies_at=None, while_saving=False, **options):
    """What a user would start, and start again after it died."""
    root.mkdir(exist_ok=True)
    options = {"batch_size": BATCH // world, "num_workers": workers, "seed": 3} | options
    trainer = L.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LastStepCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=2, save_top_k=0)],
    )
    model = Recorder(root / name, dies_at, while_saving)
    trainer.fit(model, datamodule=data(str(source), **options), ckpt_path="last")


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
def whole(shards, tmp_path_factory) -> dict[int, list]:
    """What the unbroken run saw at each step: of every sample its key, label and sum of pixels."""
    root = tmp_path_factory.mktemp("whole")
    train(ImageNetDataModule, shards, root, image_size=16)
    whole = dict(diary(root / "diary.0"))
    assert list(whole) == list(range(STEPS))
    keys = [key for step in range(EPOCH) for key, _, _ in whole[step]]
    assert len(set(keys)) == len(keys) == 24
    assert [key for key, _, _ in whole[EPOCH]] != [key for key, _, _ in whole[0]]
    return whole


# One entry per start: where it dies. A checkpoint is written after every second step, so a death in step 5 takes up
# again at 4; one in step 6 or 12 at the edge of an epoch; one in step 7 right behind it; "saving 8" repeats from 6.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("worlds", "workers", "deaths"),
    [
        ([1, 1, 1, 1], 0, [5, 6, "saving 8"]),
        ([1, 1, 1], 1, [7, 12]),
        ([1, 1], 4, [6]),
        ([1, 1], 4, [9]),
        ([2, 2], 0, [9]),
        ([2, 2, 2], 1, [5, 6]),
        ([2, 2], 4, [6]),
        ([2, 1, 2], 0, [5, 11]),  # the global batch stays, so the order does
    ],
    ids=str,
)
def test_images(shards, whole, tmp_path, worlds, workers, deaths):
    for attempt, (world, death) in enumerate(zip(worlds, [*deaths, None], strict=True)):
        options = dict(image_size=16, name=f"attempt{attempt}")
        if death is not None:
            options |= dict(dies_at=int(str(death).split()[-1]), while_saving="saving" in str(death))
        codes = run(_train_images, shards, tmp_path, world, workers, options, world=world)
        assert codes[-1] == (0 if death is None else -signal.SIGKILL)
        assert all(codes) == any(codes)
    check(whole, tmp_path, worlds)


def _train_images(shards, root, world, workers, options) -> None:
    train(ImageNetDataModule, shards, root, world, workers, **options)


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


def _train_codes(tokens, root, world, options) -> None:
    train(CodesDataModule, tokens, root, world, workers=1, **options)


@pytest.mark.slow
def test_codes(tokens, tmp_path):
    train(CodesDataModule, tokens, tmp_path / "whole")
    for attempt, (world, death) in enumerate(((2, 5), (1, 12), (1, None))):
        options = dict(name=f"attempt{attempt}", dies_at=death)
        assert run(_train_codes, tokens, tmp_path, world, options, world=world)[-1] == (-9 if death else 0)
    check(dict(diary(tmp_path / "whole" / "diary.0")), tmp_path, [2, 1, 1])


def test_another_global_batch_is_refused(shards, tokens, tmp_path):
    for data, source in ((ImageNetDataModule, shards), (CodesDataModule, tokens)):
        train(data, source, tmp_path / data.__name__)
        with pytest.raises(UserError, match="batch size x devices was 4 in the checkpoint and is 3 now; use the same"):
            train(data, source, tmp_path / data.__name__, batch_size=3)


def test_tokens_of_another_tokenizer_are_refused(tokens, tmp_path):
    train(CodesDataModule, tokens, tmp_path)
    index = CodesIndex.load(tokens)
    other = tmp_path / "other"
    other.mkdir()
    for shard in index.shards:
        (other / shard.name).write_bytes((tokens / shard.name).read_bytes())
    content = json.loads((tokens / "index.json").read_text()) | {"tokenizer": "1" * 64}
    (other / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="the checkpoint saw tokens of tokenizer 000000000000, these are of 1111111111"):
        train(CodesDataModule, other, tmp_path)


def test_resuming_late_reads_no_more_than_resuming_early(shards, tokens, tmp_path, monkeypatch):
    for data, source, reader, name in (
        (ImageNetDataModule, shards, ShardReader, "read"),
        (CodesDataModule, tokens, CodesDataset, "__getitem__"),
    ):
        root = tmp_path / data.__name__
        root.mkdir()
        reads = []
        read = getattr(reader, name)

        def counted(self, number, read=read, reads=reads, **options):
            reads.append(number)
            return read(self, number, **options)

        monkeypatch.setattr(reader, name, counted)

        def fit(data=data, source=source, root=root, ckpt_path=None, **options):
            trainer = L.Trainer(
                default_root_dir=root, accelerator="cpu", logger=False, enable_progress_bar=False, **options
            )
            model = Recorder(root / "diary", None, False)
            trainer.fit(model, datamodule=data(str(source), batch_size=BATCH), ckpt_path=ckpt_path)

        fit(max_steps=62, callbacks=[ModelCheckpoint(root, "{step}", every_n_train_steps=2, save_top_k=-1)])
        assert len(reads) >= 62 * BATCH
        counts = []
        for step in (2, 62):  # both are the third of an epoch
            reads.clear()
            fit(ckpt_path=str(root / f"step={step}.ckpt"), max_steps=step + 3, enable_checkpointing=False)
            counts.append(len(reads))
        assert counts[0] == counts[1] <= (3 + 1) * BATCH  # one batch is fetched ahead
