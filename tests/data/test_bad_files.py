"""Damaged shards and samples, as real bytes: what is good is delivered, what is bad is skipped, counted and named."""

import json
import logging
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from damaged import BOTH, link, module, validated, write_set, write_tar
from tiny_models import fit_tokenizer, write_images
from tiny_shards import CLASSES, sample

from dar_lightning.cli import main
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.sampler import EvalSampler, TrainSampler
from dar_lightning.data.shards import Shard, ShardIndex, write_shard
from dar_lightning.errors import UserError

# ---- samples


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def mixed(tmp_path):
    """A shard with all kinds of bad samples among good ones; their names with the reasons."""
    png = sample(0)[1]["png"]
    trap = pickle.dumps(Trap(tmp_path / "trapped"))
    members = [
        ("good-1.png", png),
        ("good-1.cls", b"3\n"),
        ("good-1.pyd", trap),
        ("good-1.pkl", trap),
        ("minus.png", png),
        ("minus.cls", b"-1"),
        ("far.png", png),
        ("far.cls", b"1000"),
        ("word.png", png),
        ("word.cls", b"abc"),
        ("digits.png", png),
        ("digits.cls", b"1" * 9999),
        ("unlabelled.png", png),
        ("good-2.JPG", png),  # a PNG named JPG
        ("good-2.cls", b"1"),
        ("text.png", b"not a picture"),
        ("text.cls", b"0"),
        ("cut.png", png[: len(png) // 2]),
        ("cut.cls", b"0"),
        ("pickled.pkl", trap),
        ("pickled.cls", b"0"),
        ("good-1.png", sample(1)[1]["png"]),
        ("good-1.cls", b"2"),
        ("../x.png", png),
        ("../x.cls", b"0"),
        (f"{tmp_path}/absolute.png", png),
        (f"{tmp_path}/absolute.cls", b"0"),
        ("../no-sample", b"x"),
        (link("linked.png", "/etc/hostname"), b""),
        ("linked.cls", b"0"),
        ("line\nbreak.png", png),
        ("good-3.png", png),
        ("good-3.cls", b"0"),
    ]
    write_tar(tmp_path / "0.tar", members)
    outside = "its name leads out of the shard"
    reasons = {
        "minus": "its label is '-1', the classes are 0 to 3",
        "far": "its label is '1000', the classes are 0 to 3",
        "word": "its label is 'abc', the classes are 0 to 3",
        "digits": "its label is '11111111111111111111', the classes are 0 to 3",
        "unlabelled": "no .cls member, which must hold its class number",
        "text": None,
        "cut": None,
        "pickled": "no image (jpg, jpeg, png, webp)",
        "good-1": "its key is in the shard twice",
        "../x": outside,
        f"{tmp_path}/absolute": outside,
        "../no-sample": outside,
        "linked": "it is a link, a device or a sparse file, not a plain one",
        r"'line\nbreak'": "no .cls member, which must hold its class number",
    }
    return {f"0.tar/{key}": reason for key, reason in reasons.items()}


@BOTH
def test_all_kinds_of_bad_samples(tmp_path, mixed, workers):
    before = sorted(tmp_path.rglob("*"))
    data = module(tmp_path, workers)
    assert validated(data) == [f"0.tar/good-{number}" for number in (1, 2, 3)]
    found = data.skipped["val"]
    assert set(found) == set(mixed)
    assert {name: found[name] for name, reason in mixed.items() if reason} == {k: v for k, v in mixed.items() if v}
    assert all(found.values())
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted or unpickled
    assert not (tmp_path.parent / "x.png").exists()


@pytest.mark.parametrize("count", [3, 4])
def test_the_first_of_two_samples_with_one_key(tmp_path, count):
    """Whether the index counts keys or samples, the others keep their numbers."""
    samples = [sample(number) for number in (0, 1, 0, 2)]
    members = [(f"{key}.{ending}", content) for key, parts in samples for ending, content in parts.items()]
    members[5] = (members[5][0], b"3")
    write_tar(tmp_path / "0.tar", members)
    entry = Shard("0.tar", count, (tmp_path / "0.tar").stat().st_size)
    ShardIndex(tmp_path, (entry,), CLASSES).save()
    data = module(tmp_path)
    (batch,) = data.val_dataloader()
    assert batch["key"][:3] == ["photo-000", "photo-001", "photo-002"]
    assert batch["label"][:3].tolist() == [0, 1, 2]
    assert batch["valid"].tolist() == [True, True, True, False][:count]
    assert data.skipped["val"] == ({"0.tar/photo-000": "its key is in the shard twice"} if count == 4 else {})


# ---- training


@pytest.fixture
def damaged(tmp_path):
    """26 samples, of which 3 are bad: one has no image, two are cut off."""
    names = write_set(tmp_path)
    with tarfile.open(tmp_path / "2.tar") as tar:
        cut = tar.getmember("photo-024.png").offset + 700
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:cut])
    path = tmp_path / "0.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(sample(3)[1]["png"], bytes(len(sample(3)[1]["png"]))))
    return tmp_path, [name for name in names if name[-3:] not in ("003", "024", "025")]


def taken(data: ImageNetDataModule, epochs: int, start: int = 0) -> list[tuple]:
    loader = data.train_dataloader()
    loader.sampler.position = start
    return [
        (batch["key"], batch["index"].tolist(), batch["label"].tolist(), batch["image"])
        for _ in range(epochs)
        for batch in loader
    ]


def same(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(
        a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(one, other, strict=True)
    )


def test_training_puts_good_samples_in_the_places_of_bad_ones(damaged):
    folder, names = damaged
    data = module(folder, 0, batch_size=2)
    one = taken(data, 2)
    assert len(one) == 26  # 13 batches an epoch
    for keys, numbers, labels, images in one:
        assert images.shape == (2, 3, 16, 16)
        assert keys == [f"photo-{number:03d}" for number in numbers]  # named for what it shows
        assert labels == [number % 4 for number in numbers]
    for epoch in (one[:13], one[13:]):
        assert {key for keys, *_ in epoch for key in keys} == {name.partition("/")[2] for name in names}
    assert list(data.skipped["train"]) == ["2.tar/photo-024", "2.tar/#6", "0.tar/photo-003"]
    two = module(folder, 2, batch_size=2)
    assert same(one, taken(two, 2))
    assert two.skipped == data.skipped
    assert same(one[5:], taken(module(folder, 2, batch_size=2), 2, start=5)[: len(one) - 5])
    assert not same(one, taken(module(folder, 0, batch_size=2, seed=1), 2))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_stay_equal(damaged, world):
    folder, names = damaged
    data = module(folder)
    dataset = data.val_dataloader().dataset
    ranks = [[dataset[ticket] for ticket in EvalSampler(dataset, world, rank)] for rank in range(world)]
    assert len({len(items) for items in ranks}) == 1
    valid = [f"{item['shard']}/{item['key']}" for items in ranks for item in items if item["valid"]]
    assert sorted(valid) == sorted(names)
    loader = data.train_dataloader()
    whole = [loader.dataset[ticket]["key"] for ticket in TrainSampler(loader.dataset, loader.sampler.order, 14, 1, 0)]
    if 14 % world == 0:
        size = 14 // world
        parts = [TrainSampler(loader.dataset, loader.sampler.order, size, world, rank) for rank in range(world)]
        assert [loader.dataset[ticket]["key"] for part in parts for ticket in part] == whole


# ---- how many are too many


@BOTH
def test_the_limit(tmp_path, workers, caplog):
    """50 samples, one bad: 2 percent."""
    write_set(tmp_path, (50,))
    png = sample(7)[1]["png"]
    path = tmp_path / "0.tar"
    path.write_bytes(path.read_bytes().replace(png, b"\x89PNG" + bytes(len(png) - 4)))
    data = module(tmp_path, workers, max_bad_share=0.02)
    for _ in range(2):
        assert len(validated(data)) == 49
    assert list(data.skipped["val"]) == ["0.tar/photo-007"]
    assert len([line for line in caplog.messages if "skipped 0.tar/photo-007: " in line]) == 1
    caplog.clear()
    for loader in ("val_dataloader", "train_dataloader"):
        with pytest.raises(UserError) as error:
            list(getattr(module(tmp_path, workers, max_bad_share=0.01), loader)())
        split = loader.partition("_")[0]
        start = f"data.{split}: 1 of 50 samples cannot be used (2.00%, max_bad_share is 1.00%), the first is 0.tar/phot"
        assert str(error.value).startswith(start)
        assert "\n" not in str(error.value)
    named = [message.partition(": not")[0] for message in caplog.messages]
    assert named == [f"data.{split}: skipped 0.tar/photo-007" for split in ("val", "train")]


def test_all_are_named_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_set(tmp_path, (40, 9))
    for number in range(30):
        png = sample(number)[1]["png"]
        content = (tmp_path / "0.tar").read_bytes()
        (tmp_path / "0.tar").write_bytes(content.replace(png, bytes(len(png))))
    (tmp_path / "1.tar").unlink()
    data = module(tmp_path)
    assert len(validated(data)) == 10
    assert len(data.skipped["val"]) == 39
    assert caplog.messages[0] == "data.val: skipped 1.tar/#0: the file is missing, and 8 more like it"
    assert len(caplog.messages) == 31
    for number in range(30):
        assert any(f"0.tar/photo-{number:03d}: not an image" in message for message in caplog.messages)


@BOTH
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_set_that_is_all_bad(tmp_path, workers, share):
    write_shard(tmp_path / "0.tar", [(str(i), {"png": b"no picture", "cls": b"0"}) for i in range(20)])
    data = module(tmp_path, workers, max_bad_share=share)
    with pytest.raises(
        UserError, match=r"data\.train: of 1000 samples none can be used, among them 0\.tar/\d+: "
    ) as error:
        next(iter(data.train_dataloader()))
    assert "\n" not in str(error.value)
    if share == 1.0:
        assert validated(data) == []
    else:
        with pytest.raises(UserError, match=r"data\.val: 4 of 20 samples cannot be used \(20\.00%"):
            validated(data)


def test_a_share_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"data\.max_bad_share: 2 is not a share"):
        module(tmp_path, max_bad_share=2)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [(3,), (3, 4)], ids=["on one rank", "on any"])
def test_two_ranks_stop_together(tmp_path, bad):
    """The share counts over both; each stops when the other does, and one says why."""
    images = write_images(tmp_path / "images", 40, label=lambda number: 9 if number in bad else 0)
    command = [*fit_tokenizer(images, images, tmp_path / "run", max_steps=30), "--trainer.strategy=ddp"]
    limit = len(bad) / 40 - 0.001
    command += ["--trainer.devices=2", f"--data.init_args.max_bad_share={limit}", "--data.init_args.num_workers=1"]
    command = [sys.executable, "-m", "dar_lightning", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dar fit: ")]
    assert f"data.train: {len(bad)} of 40 samples cannot be used" in line
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore")
def test_training_stops_with_one_line(tmp_path, capsys):
    """The command itself, with worker processes: a shard of five is missing; then one of its labels is wrong."""
    images = Path(write_images(tmp_path / "images", 8))
    shard = json.loads((images / "index.json").read_text())["shards"][0]
    more = [shard | {"name": f"{i:06d}.tar"} for i in range(1, 5)]
    index = json.loads((images / "index.json").read_text())
    for entry in more[:3]:
        (images / entry["name"]).write_bytes((images / shard["name"]).read_bytes())
    (images / "index.json").write_text(json.dumps(index | {"shards": [shard, *more]}))
    wrong = write_images(tmp_path / "wrong", 8, label=lambda number: 4 if number == 3 else 0)
    expected = {
        str(images): "data.train: 8 of 40 samples cannot be used (20.00%, max_bad_share is 1.00%), the first is "
        "000004.tar/#0: the file is missing",
        wrong: "data.train: 1 of 8 samples cannot be used (12.50%, max_bad_share is 1.00%), the first is "
        "000000.tar/0003: its label is '4', the classes are 0 to 3",
    }
    for folder, line in expected.items():
        command = [*fit_tokenizer(folder, wrong, tmp_path / "run", max_steps=2), "--data.init_args.num_workers=2"]
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in command])
        assert stop.value.code == 2
        said = [each for each in capsys.readouterr().err.splitlines() if not each.startswith("Seed set to")]
        assert said == [f"dar fit: {line}"]
