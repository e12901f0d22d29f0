"""Bad samples are skipped, named once in the log and counted; too many of them stop the run, on all ranks."""

import logging
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from recorder import Recorder, fit
from refusals import refusal, refused
from tiny_models import fit_tokenizer, write_images
from tiny_shards import module, validated, write_set

from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError


def test_the_limit(tmp_path, caplog):
    """50 samples, one bad: 2 percent."""
    write_set(tmp_path, (50,), bad={7})
    data = module(tmp_path, max_bad_share=0.02)
    for _ in range(2):
        assert len(validated(data)) == 49
    line = "skipped 000000.tar/photo-007: not an image of a known format"
    assert caplog.messages == [f"data.val: {line}"]
    for split in ("val", "train"):
        caplog.clear()
        with pytest.raises(UserError) as error:
            list(getattr(module(tmp_path, max_bad_share=0.01), f"{split}_dataloader")())
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
    line = r"^data\.train: of 1000 samples none can be used, among them 0\.tar/\d+: [^\n]*$"
    refused(line, lambda: next(iter(data.train_dataloader())))
    assert validated(data) == []


def test_the_share_is_one_of_the_classes_in_use(tmp_path):
    """One of four classes, most of which is bad: it is a small part of the shards and a large one of the data."""
    write_set(tmp_path, (40,), bad=range(0, 36, 4))
    assert len(list(module(tmp_path, max_bad_share=0.225).val_dataloader())) == 10  # 9 of 40
    for loader in ("train_dataloader", "val_dataloader"):
        data = module(tmp_path, classes=["a"], max_bad_share=0.225, batch_size=2)
        with pytest.raises(UserError, match=r"\d of 10 samples cannot be used"):
            list(getattr(data, loader)())


def test_training_stops_with_one_line(tmp_path, capsys):
    """The command itself, with worker processes: one label of eight is wrong."""
    images = write_images(tmp_path / "images", 8, label=lambda number: 4 if number == 3 else 0)
    command = [*fit_tokenizer(images, images, tmp_path / "run", max_steps=2), "--data.init_args.num_workers=2"]
    assert refusal(capsys, command) == (
        "dar fit: data.train: 1 of 8 samples cannot be used (12.50%, max_bad_share is 1.00%), the first is "
        "000000.tar/0003: its label is '4', the classes are 0 to 3"
    )


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


class Counting(Recorder):
    """Writes down how many batches each rank has trained on."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        Path(self.trainer.default_root_dir, f"seen.{self.global_rank}").write_text(str(len(self.seen)))


def train(folder: Path, max_bad_share: float, steps: int) -> None:
    data = module(folder, batch_size=2, max_bad_share=max_bad_share)
    data.val = None
    fit(data, Counting(), devices=2, strategy="ddp", max_steps=steps, default_root_dir=folder)


@pytest.mark.parametrize(
    ("places", "max_bad_share", "steps", "bad"),
    [
        ([(6, 1, 0)], 0.01, 7, r"1 of 40 samples cannot be used \(2\.50%, max_bad_share is 1\.00%\), the first is 0"),
        ([(0, 0, 0), (1, 1, 0)], 0.049, 30, "2 of 40 samples cannot be used"),
    ],
    ids=["after the last comparison", "in mid-epoch, counted over both"],
)
def test_two_ranks_stop_together(pair, tmp_path, places, max_bad_share, steps, bad):
    """Bad samples at these batches, ranks and rows: both ranks end, and rank 0 says why."""
    write_set(tmp_path, (40,))
    order = module(tmp_path).train_dataloader().sampler.order(0)
    write_set(tmp_path, (40,), bad={order[4 * batch + 2 * rank + row] for batch, rank, row in places})
    first, second = pair(train, tmp_path, max_bad_share, steps)
    assert first.startswith("UserError: data.train: ")
    assert re.search(bad, first)
    assert second == "SystemExit: 0"
    assert int((tmp_path / "seen.0").read_text()) <= 7
