"""Shards on disk: read back by webdataset itself, rebuilt to the same bytes, and what users get wrong."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import CLASSES, SIZES, picture, sample

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import read_header, write_codes
from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, file_sha256


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def test_webdataset_reads_what_we_write(shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(each["__key__"], each["png"], each["cls"]) for each in read] == [
        (key, members["png"], members["cls"]) for key, members in map(sample, range(sum(SIZES)))
    ]


def test_we_read_what_webdataset_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as writer:
        for number in range(5):
            key, members = sample(number)
            writer.write({"__key__": f"folder/{key}", **members})
    reader = ShardReader(ShardIndex.load(tmp_path))
    assert [reader[i] for i in (3, 0)] == [("x.tar", f"folder/{sample(i)[0]}", sample(i)[1]) for i in (3, 0)]


def test_reader_has_every_sample_and_survives_pickling(shards):
    reader = ShardReader(ShardIndex.load(shards), max_open=1)
    order = [25, 0, 10, 9, 18, 19]
    expected = [sample(number) for number in order]
    assert [reader[number][1:] for number in order] == expected
    clone = pickle.loads(pickle.dumps(reader))
    assert [clone[number][1:] for number in order] == expected
    with pytest.raises(IndexError):
        reader[26]


def test_same_samples_same_bytes(tmp_path):
    shards = [write_shard(tmp_path / name / "0.tar", map(sample, range(4))) for name in ("a", "b")]
    assert shards[0] == shards[1]
    assert shards[0].sha256 == file_sha256(tmp_path / "a" / "0.tar")
    with tarfile.open(tmp_path / "a" / "0.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield sample(0)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "0.tar", broken())
    assert list(tmp_path.iterdir()) == []


def test_keys_are_unique(tmp_path):
    with pytest.raises(UserError, match=r"0\.tar: two samples have the key photo-000"):
        write_shard(tmp_path / "0.tar", [sample(0), sample(1), sample(0)])
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), atomic_path(tmp_path / "file" / "x.tar"):
        pass


def test_index_and_pattern_agree(shards):
    whole = ShardIndex.load(shards)
    assert ShardIndex.load(f"{shards}/{{000000..000002}}.tar") == whole
    assert ShardIndex.load(f"{shards}/00000{{0,2}}.tar").num_samples == SIZES[0] + SIZES[2]
    assert (whole.classes, whole.num_samples) == (CLASSES, sum(SIZES))


def test_shards_without_an_index_are_counted(copy):
    (copy / "index.json").unlink()
    index = ShardIndex.load(copy)
    assert [shard.samples for shard in index.shards] == list(SIZES)
    assert index.classes == ()


def break_(folder, what):
    if what == "nothing there":
        shutil.rmtree(folder)
    elif what == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif what == "missing shard":
        (folder / "000001.tar").unlink()
    elif what == "no shard":
        for path in folder.glob("*.tar"):
            path.unlink()
    elif what == "hostile index":
        text = (folder / "index.json").read_text()
        (folder / "index.json").write_text(text.replace("000001.tar", "../x.tar"))
    elif what == "cut shard":
        path = folder / "000001.tar"
        path.write_bytes(path.read_bytes()[:5120])
    elif what == "not an index":
        (folder / "index.json").write_text('{"shards": 3}')
    elif what == "newer index":
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | {"version": 9}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing there", r"data\.train: .*copy does not exist"),
        ("empty folder", r"data\.train: no samples in .*copy"),
        ("missing shard", r"data\.train: 9 of 26 samples .* the first is 000001\.tar/#0: the file is missing"),
        ("cut shard", r"data\.train: 9 of 26 samples .* 000001\.tar/photo-010: the tar file ends inside of it"),
        ("no shard", r"data\.train: nothing in .*copy can be read; 000000\.tar/#0: the file is missing"),
        ("hostile index", r"data\.train: .*index\.json is not a shard index .*'\.\./x\.tar' with 9 samples"),
        ("not an index", r"data\.train: .*index\.json is not a shard index"),
        ("newer index", r"data\.train: .*index\.json has version 9, this program reads version 1"),
    ],
)
def test_mistakes_get_one_line(copy, what, message):
    break_(copy, what)
    with pytest.raises(UserError, match=message) as error:
        ImageNetDataModule(str(copy), image_size=16).train_dataloader()
    assert "\n" not in str(error.value)


def test_missing_shard_of_a_pattern(copy):
    with pytest.raises(UserError, match=r"000003\.tar is missing \(1 of 4 named by"):
        ShardIndex.load(f"{copy}/{{000000..000003}}.tar")


def test_count_that_disagrees_with_the_index(copy):
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace('"samples": 9', '"samples": 8'))
    with pytest.raises(UserError, match=r"holds 9 samples, its index\.json says 8"):
        ShardReader(ShardIndex.load(copy))[12]


def test_other_mistakes(shards, tmp_path):
    with pytest.raises(UserError, match=r"data\.train: not set"):
        ImageNetDataModule().train_dataloader()
    with pytest.raises(UserError, match=r"batch_size: 27 on 1 device\(s\) is more than the 26 training samples"):
        ImageNetDataModule(str(shards), batch_size=27).train_dataloader()
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(UserError, match=r"nothing in .* can be read; x\.tar/#0: not an uncompressed tar file"):
        ShardIndex.load(tmp_path)
    write_shard(tmp_path / "x.tar", [sample(0)])
    with pytest.raises(UserError, match=r"data\.num_classes: .* no index\.json"):
        _ = ImageNetDataModule(str(tmp_path)).num_classes


def test_modes_and_types(tmp_path):
    """Palette and grey images become RGB."""
    for i, mode in enumerate(("P", "L", "RGBA")):
        buffer = io.BytesIO()
        picture(0).convert(mode).save(buffer, "PNG")
        write_shard(tmp_path / f"{i}.tar", [(mode, {"PNG": buffer.getvalue(), "cls": b"0\n"})])
    batch = next(iter(ImageNetDataModule(str(tmp_path), image_size=16, batch_size=3, num_classes=1).train_dataloader()))
    assert batch["image"].shape == (3, 3, 16, 16)


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    """Whatever a library makes of it: other users of a cluster read tokens and weights, too."""
    before = os.umask(0o027)
    try:
        write_codes(tmp_path / "x.safetensors", np.zeros((1, 1, 4), np.uint16), np.zeros(1, np.int64), ["a"], {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_token_shards_that_must_not_be_read(tmp_path, monkeypatch):
    """Not to be deleted for that."""

    def refused(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read \(Permission denied\)$"):
        read_header(tmp_path / "x.safetensors")


def test_signed_addresses_and_indexes_of_others(copy):
    with pytest.raises(UserError, match=r"^shards: https://host/\{0\.\.9\}\.tar\?\.\.\. has a query, .* without$"):
        ShardIndex.load("https://host/{0..9}.tar?secret=1")
    (copy / "index.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": []}))
    with pytest.raises(UserError, match=r"^shards: \S+index\.json is webdataset's \(widsindex\), another format; ren"):
        ShardIndex.load(copy)
