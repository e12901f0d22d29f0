"""Bad samples are skipped, named once in the log and counted; too many of them stop the run, on all ranks."""

import json
import logging
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch.distributed as dist
from recorder import Recorder
from tiny_models import fit_tokenizer, write_images
from tiny_shards import module, sample, validated, write_set

from dar_lightning.cli import main
from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit(tmp_path, workers, caplog):
    """50 samples, one bad: 2 percent."""
    write_set(tmp_path, (50,), bad={7})
    data = module(tmp_path, num_workers=workers, max_bad_share=0.02)
    for _ in range(2):
        assert len(validated(data)) == 49
    line = "skipped 000000.tar/photo-007: not an image of a known format"
    assert caplog.messages == [f"data.val: {line}"]
    for split in ("val", "train"):
        caplog.clear()
        with pytest.raises(UserError) as error:
            list(getattr(module(tmp_path, num_workers=workers, max_bad_share=0.01), f"{split}_dataloader")())
        assert str(error.value) == (
            f"data.{split}: 1 of 50 samples cannot be used (2.00%, max_bad_share is 1.00%), the first is "
            + line.removeprefix("skipped ")
        )
        assert caplog.messages == [f"data.{split}: {line}"]


def test_all_are_named_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_set(tmp_path, (40, 9), bad=range(30))
    (tmp_path / "000001.tar").unlink()
    data = module(tmp_path, max_bad_share=0.9)
    assert len(validated(data)) == 10
    assert len(data.skipped["val"]) == 39
    first, *others = caplog.messages
    assert first == "data.val: skipped 000001.tar/#0: the file is missing, and 8 more like it"
    bad = [f"data.val: skipped 000000.tar/photo-{number:03d}: not an image of a known format" for number in range(30)]
    assert others == bad


def test_a_set_that_is_all_bad(tmp_path):
    write_shard(tmp_path / "0.tar", [(str(i), {"png": b"no picture", "cls": b"0"}) for i in range(20)])
    data = module(tmp_path, max_bad_share=1.0, num_workers=1)
    with pytest.raises(
        UserError, match=r"^data\.train: of 1000 samples none can be used, among them 0\.tar/\d+: [^\n]*$"
    ):
        next(iter(data.train_dataloader()))
    assert validated(data) == []


def test_the_share_is_one_of_the_classes_in_use(tmp_path):
    """One of four classes, most of which is bad: it is a small part of the shards and a large one of the data."""
    write_set(tmp_path, (40,), bad=range(0, 36, 4))
    assert len(list(module(tmp_path, max_bad_share=0.225).val_dataloader())) == 10  # 9 of 40
    for loader in ("train_dataloader", "val_dataloader"):
        data = module(tmp_path, classes=["a"], max_bad_share=0.225, batch_size=2)
        with pytest.raises(UserError, match=r"\d of 10 samples cannot be used"):
            list(getattr(data, loader)())


@pytest.mark.parametrize("key", ["i: x", "a:b: c/d"])
def test_keys_with_colons_keep_their_names(tmp_path, key):
    write_shard(tmp_path / "0.tar", [(f"{key}{i}", {"png": b"x", "cls": b"0"}) for i in range(2)] + [sample(0)])
    data = module(tmp_path, max_bad_share=0.9)
    (batch,) = data.val_dataloader()
    assert batch["key"][:2] == [f"{key}0", f"{key}1"]
    assert batch["shard"] == ["0.tar"] * 3
    assert data.skipped["val"] == dict.fromkeys((f"0.tar/{key}0", f"0.tar/{key}1"), "not an image of a known format")


@pytest.mark.filterwarnings("ignore")
def test_training_stops_with_one_line(tmp_path, capsys):
    """The command itself, with worker processes: one label of eight is wrong."""
    images = write_images(tmp_path / "images", 8, label=lambda number: 4 if number == 3 else 0)
    command = [*fit_tokenizer(images, images, tmp_path / "run", max_steps=2), "--data.init_args.num_workers=2"]
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in command])
    assert stop.value.code == 2
    said = [each for each in capsys.readouterr().err.splitlines() if not each.startswith("Seed set to")]
    assert said == [
        "dar fit: data.train: 1 of 8 samples cannot be used (12.50%, max_bad_share is 1.00%), the first is "
        "000000.tar/0003: its label is '4', the classes are 0 to 3"
    ]


# ---- two ranks

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def compare() -> list:
    rank = dist.get_rank()
    skipped = Skipped("data.train", 100, 0.03)
    known = []
    for found in ([], [rank], [rank], [1 - rank], [2], [3 + rank]):  # the last one is one too many
        skipped.add(Bad(f"0.tar/{number}", "empty") for number in found)
        try:
            skipped.check(everywhere=True)
            known.append(sorted(skipped.reasons))
        except (UserError, SystemExit) as error:
            known.append(f"{type(error).__name__}: {error}")
    return known


def test_ranks_count_a_sample_once(pair):
    """What one has met the other knows, so that it does not count twice when it comes to that one."""
    first, second = pair(compare)
    both, three = ["0.tar/0", "0.tar/1"], ["0.tar/0", "0.tar/1", "0.tar/2"]
    assert first[:-1] == second[:-1] == [[], both, both, both, three]
    assert first[-1].startswith("UserError: data.train: 5 of 100 samples cannot be used (5.00%")
    assert second[-1] == "SystemExit: 0"


def train(folder: Path, seen: Path, max_bad_share: float = 0.01, **options) -> None:
    """Train on two ranks; seen.0 and seen.1 get the indices of each rank's batches, a line each."""
    data = module(folder, batch_size=2, max_bad_share=max_bad_share)
    data.val = None
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", num_sanity_val_steps=0, **QUIET, **options)

    class Writing(Recorder):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with open(f"{seen}.{self.global_rank}", "a") as file:
                print(json.dumps(batch["index"].tolist()), file=file)

    trainer.fit(Writing(), datamodule=data)


STEPS = {"max_steps": 7}
BATCHES = {"max_epochs": 1, "limit_train_batches": 3, "accumulate_grad_batches": 2}


@pytest.fixture(scope="module")
def seen(pair, tmp_path_factory) -> list[list[list[int]]]:
    """What each rank sees in seven steps."""
    folder = tmp_path_factory.mktemp("whole")
    write_set(folder, (40,))
    assert pair(partial(train, **STEPS), folder, folder / "seen") == [None, None]
    return [[json.loads(line) for line in (folder / f"seen.{rank}").read_text().splitlines()] for rank in (0, 1)]


@pytest.mark.parametrize(("options", "batches"), [(STEPS, 7), (BATCHES, 3)], ids=["steps", "batches"])
def test_what_comes_after_the_last_comparison_counts(pair, tmp_path, seen, options, batches):
    """One sample of the last batch of a limited run is bad, on rank 1; both ranks end, and rank 0 says why."""
    bad = seen[1][batches - 1][0]
    write_set(tmp_path, (40,), bad={bad})
    first, second = pair(partial(train, **options), tmp_path, tmp_path / "seen")
    assert (
        "UserError: data.train: 1 of 40 samples cannot be used (2.50%, max_bad_share is 1.00%), the first is " in first
    )
    assert f"000000.tar/photo-{bad:03d}: " in first
    assert second == "SystemExit: 0"


def test_two_ranks_stop_together(pair, tmp_path, seen):
    """In mid-epoch, at the next comparison: the share counts over both."""
    bad = {seen[0][0][0], seen[1][1][0]}
    write_set(tmp_path, (40,), bad=bad)
    options = {"max_bad_share": 0.049, "max_steps": 30}
    first, second = pair(partial(train, **options), tmp_path, tmp_path / "seen")
    assert first.startswith("UserError: data.train: 2 of 40 samples cannot be used")
    assert second == "SystemExit: 0"
    assert len((tmp_path / "seen.0").read_text().splitlines()) < 10
