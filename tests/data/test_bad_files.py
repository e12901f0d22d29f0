"""Damaged shards and samples, as real bytes: what is good is delivered, what is bad is skipped, counted and named."""

import io
import json
import logging
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from tiny_models import fit_tokenizer, write_images
from tiny_shards import CLASSES, SIZES, sample

from dar_lightning.cli import main
from dar_lightning.data import shards
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import Shard, ShardIndex, sha256, write_shard
from dar_lightning.data.stream import EvalSampler, TrainSampler
from dar_lightning.data.tar import read_headers
from dar_lightning.errors import UserError

BOTH = pytest.mark.parametrize("workers", [0, 2])


def module(folder: Path, workers: int = 0, **options) -> ImageNetDataModule:
    common = {"image_size": 16, "batch_size": 4, "num_workers": workers, "num_classes": 4, "max_bad_share": 0.9}
    return ImageNetDataModule(str(folder), str(folder), **common | options)


def validated(data: ImageNetDataModule) -> list[str]:
    """shard/key of the good samples that validation gives."""
    batches = list(data.val_dataloader())
    assert all(set(batch) == {"image", "label", "key", "shard", "index", "valid"} for batch in batches)
    return [
        f"{shard}/{key}"
        for batch in batches
        for shard, key, valid in zip(batch["shard"], batch["key"], batch["valid"], strict=True)
        if valid
    ]


def write_set(folder: Path, sizes=SIZES) -> list[str]:
    """Shards 0.tar, 1.tar, ... of numbered pictures, with an index; their shard/key."""
    numbers = iter(range(sum(sizes)))
    names, entries = [], []
    for i, size in enumerate(sizes):
        samples = [sample(next(numbers)) for _ in range(size)]
        entries.append(write_shard(folder / f"{i}.tar", samples))
        names += [f"{i}.tar/{key}" for key, _ in samples]
    ShardIndex(folder, tuple(entries), CLASSES).save()
    return names


def write_tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    """A tar of anything, in the given order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            header.size = len(content) if header.isreg() else 0
            tar.addfile(header, io.BytesIO(content))


def link(name: str, target: str) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = tarfile.SYMTYPE, target
    return header


# ---- files


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_cut_anywhere(tmp_path, indexed):
    """At every block, one byte before and after it, and somewhere inside."""
    names = write_set(tmp_path, (2, 3))
    if not indexed:
        (tmp_path / "index.json").unlink()
    path = tmp_path / "1.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends: dict[str, int] = {}  # where the last byte of each sample lies
        for member in tar:
            key = member.name.partition(".")[0]
            ends[f"1.tar/{key}"] = member.offset_data + member.size
        blocks = range(0, len(whole) + 1, 512)
    for cut in sorted({max(0, block + more) for block in blocks for more in (-1, 0, 1, 201)}):
        path.write_bytes(whole[:cut])
        good = names[:2] + [name for name, end in ends.items() if end <= cut]
        data = module(tmp_path)
        assert validated(data) == good, cut
        bad = data.skipped["val"]
        if indexed:
            assert len(bad) == 5 - len(good), cut
        elif len(good) < 5:
            assert len(bad) >= 1, cut
        assert all(name.startswith("1.tar/") for name in bad)


def write_other(path: Path, what: str) -> None:
    contents = {"nothing": b"", "zeros": bytes(5000), "text": b"not a tar" * 1000, "gzip": b"\x1f\x8b" + bytes(3000)}
    if what == "folder":
        path.mkdir()
    elif what == "pipe":  # to open it would wait for ever
        os.mkfifo(path)
    elif what != "missing":
        path.write_bytes(contents[what])


@BOTH
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", "the file is missing"),
        ("nothing", "not an uncompressed tar file"),
        ("zeros", "the tar holds 0 samples only"),
        ("text", "not an uncompressed tar file"),
        ("gzip", "not an uncompressed tar file"),
        ("folder", "it is not a file"),
        ("pipe", "it is not a file"),
    ],
)
def test_files_that_are_no_shards(tmp_path, what, reason, workers):
    names = write_set(tmp_path)
    (tmp_path / "1.tar").unlink()
    write_other(tmp_path / "1.tar", what)
    data = module(tmp_path, workers)
    assert validated(data) == [name for name in names if not name.startswith("1.tar")]
    assert data.skipped["val"] == {f"1.tar/#{number}": reason for number in range(9)}
    with pytest.raises(UserError) as error:
        module(tmp_path, workers, max_bad_share=0.3).val_dataloader()
    assert str(error.value) == (
        f"data.val: 9 of 26 samples cannot be used (34.62%, max_bad_share is 30.00%), the first is 1.tar/#0: {reason}"
    )


def test_a_damaged_header_costs_its_sample_only(tmp_path):
    names = write_set(tmp_path, (5,))
    path = tmp_path / "0.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("photo-002.png").offset
    content[header + 10] ^= 255
    path.write_bytes(content)
    data = module(tmp_path)
    assert validated(data) == [*names[:2], *names[3:]]
    assert data.skipped["val"] == {"0.tar/photo-002": "no image (jpg, jpeg, png, webp)"}
    assert "damaged at byte" in read_headers(path).damage


def test_a_header_of_negative_size(tmp_path):
    """`tarfile` of Python 3.11 goes back by it, and round in circles."""
    write_tar(tmp_path / "0.tar", [("a.png", sample(0)[1]["png"]), ("a.cls", b"0")])
    content = bytearray((tmp_path / "0.tar").read_bytes())
    with tarfile.open(tmp_path / "0.tar") as tar:
        header = tar.getmember("a.cls").offset
    content[header + 124 : header + 136] = (2**96 - 2048).to_bytes(12)  # base 256, minus 2048
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    (tmp_path / "0.tar").write_bytes(content)
    samples, damage = read_headers(tmp_path / "0.tar")
    assert ([key for key, _, _ in samples], damage) == (["a"], f"a header is damaged at byte {header}")


def written_by_webdataset(path: Path, key: str) -> list[str]:
    """A shard of 12 samples and its index; names of the samples. A member has two headers, as the names may be long."""
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(12):
            writer.write({"__key__": key.format(number)} | sample(number)[1])
    entry = Shard(path.name, 12, path.stat().st_size, sha256(path))
    ShardIndex(path.parent, (entry,), CLASSES).save()
    return [f"{path.name}/{key.format(number)}" for number in range(12)]


@pytest.mark.parametrize("key", ["{:03d}", "{:03d}" + "x" * 150], ids=["short", "long"])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_bit_in_any_header_of_webdataset_costs_two_samples_at_most(tmp_path, key, indexed):
    """In any of a member's blocks that are not its content: header, extended header, and what that holds."""
    names = written_by_webdataset(tmp_path / "0.tar", key)
    assert validated(module(tmp_path)) == names
    if not indexed:
        (tmp_path / "index.json").unlink()
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        members = tar.getmembers()
    starts = [0, *(-(-(member.offset_data + member.size) // 512) * 512 for member in members)]
    bits = [
        8 * byte + bit
        for start, member in zip(starts, members, strict=False)
        for byte, bit in np.random.default_rng(start).integers((start, 0), (member.offset_data, 8), (12, 2))
    ]
    assert min(member.offset_data - start for start, member in zip(starts, members, strict=False)) >= 3 * 512
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "0.tar").write_bytes(content)
        data = module(tmp_path)
        good = validated(data)
        assert len(set(names) - set(good)) <= 2, bit
        assert len(set(good) - set(names)) <= 1, bit  # a name that is another now
        assert set(names) <= {*good, *data.skipped["val"]} or len(data.skipped["val"]) > 0, bit


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2**50, 7 * 2**30, 2**21])
def test_an_extended_header_of_impossible_size(tmp_path, kind, size):
    names = write_set(tmp_path, (5,))
    (tmp_path / "index.json").unlink()
    whole = (tmp_path / "0.tar").read_bytes()
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + whole)
    assert validated(module(tmp_path)) == names
    assert read_headers(tmp_path / "0.tar").damage == "a header is damaged at byte 0"


def test_a_name_that_is_too_long(tmp_path):
    names = write_set(tmp_path, (5,))
    (tmp_path / "index.json").unlink()
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("y" * 5000 + ".cls"))
    data = module(tmp_path)
    assert validated(data) == names
    assert data.skipped["val"] == {f"0.tar/{'y' * 4096}": "its name is too long"}


def test_keys_with_colons_are_counted_one_by_one(tmp_path):
    samples = [(f"img: {number}", {"png": b"no picture", "cls": b"0"}) for number in range(3)]
    write_shard(tmp_path / "0.tar", [*samples, *(sample(number) for number in range(3))])
    with pytest.raises(UserError, match=r"data\.val: 3 of 6 samples cannot be used \(50\.00%, max_bad_share is 40"):
        validated(module(tmp_path, max_bad_share=0.4))


def test_a_file_that_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch):
    """Too many open files, say: to skip its samples would be to lose them."""
    write_set(tmp_path, (5,))
    data = module(tmp_path, max_bad_share=1)
    loader = data.val_dataloader()

    def refused(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(shards, "read_headers", refused)
    with pytest.raises(UserError, match=r"0\.tar cannot be read \(Too many open files\)"):
        list(loader)
    monkeypatch.undo()
    assert len(validated(data)) == 5


def test_tars_that_are_in_order(tmp_path):
    """A header of all files, long names, folders, two tars in one: no damage."""
    content = b""
    for name in ("a", "b"):
        with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for member in (f"folder/{name}.png", f"folder/{name * 200}.png", "README"):
                tar.addfile(tarfile.TarInfo(member))
        content += (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content)
    samples, damage = read_headers(tmp_path / "0.tar")
    assert damage == ""
    assert [key for key, _, _ in samples] == ["folder/a", f"folder/{'a' * 200}", "folder/b", f"folder/{'b' * 200}"]


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
