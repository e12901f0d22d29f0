"""Shards on disk: carried to and from webdataset, rebuilt to the same bytes, and what users get wrong."""

import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from refusals import refused
from tiny_shards import CLASSES, SIZES, module, sample, write_tar

from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import write_codes
from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, file_sha256


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def test_webdataset_reads_what_we_write(shards):
    """And `wids`, which reads by number, needs a version and, of each shard, address and number of samples."""
    paths = sorted(shards.glob("*.tar"))
    read = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [(each["__key__"], each["png"], each["cls"]) for each in read] == [
        (key, members["png"], members["cls"]) for key, members in map(sample, range(sum(SIZES)))
    ]
    index = json.loads((shards / "index.json").read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    assert index["shardlist"] == [
        {"url": path.name, "nsamples": size, "filesize": path.stat().st_size}
        for path, size in zip(paths, SIZES, strict=True)
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
    for _ in range(2):
        assert [reader[number][1:] for number in order] == [sample(number) for number in order]
        assert len(reader._open) == 1
        reader = pickle.loads(pickle.dumps(reader))  # whose open file stays behind
    assert reader.read(3, only=("cls",))[2] == {"cls": b"3"}
    with pytest.raises(IndexError):
        reader[26]


def test_same_samples_same_bytes(tmp_path):
    """Against a tar that is put together by hand; webdataset alone would write time and owner, and leave `_x` out."""
    members = {"_x": b"x", "cls": b"1", "png": b"p" * 600}
    entry = write_shard(tmp_path / "0.tar", [("k" * 120, dict(reversed(members.items())))])
    write_tar(tmp_path / "by-hand.tar", [(f"{'k' * 120}.{name}", content) for name, content in members.items()])
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "by-hand.tar").read_bytes()
    assert (entry.sha256, entry.samples) == (file_sha256(tmp_path / "0.tar"), 1)
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_a_failed_write_leaves_nothing(tmp_path):
    def broken():
        yield sample(0)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "0.tar", broken())
    refused(r"0\.tar: two samples have the", lambda: write_shard(tmp_path / "0.tar", [sample(0), sample(1), sample(0)]))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), atomic_path(tmp_path / "file" / "x.tar"):
        pass


def test_index_pattern_and_no_index(copy):
    """Without an index, the samples are counted and the classes are unknown."""
    whole = ShardIndex.load(copy)
    assert ShardIndex.load(f"{copy}/{{000000..000002}}.tar") == whole
    assert ShardIndex.load(f"{copy}/00000{{0,2}}.tar").num_samples == SIZES[0] + SIZES[2]
    assert (whole.classes, whole.num_samples) == (CLASSES, sum(SIZES))
    (copy / "index.json").unlink()
    index = ShardIndex.load(copy)
    assert [shard.samples for shard in index.shards] == list(SIZES)
    assert index.classes == ()
    with pytest.raises(UserError, match=r"data\.num_classes: .* no index\.json"):
        _ = module(copy, num_classes=None).num_classes


def in_index(old: str, new: str):
    return lambda folder: (folder / "index.json").write_text((folder / "index.json").read_text().replace(old, new))


def only(name: str, content: bytes):
    def write(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("break_", "pattern", "message"),
    [
        (shutil.rmtree, "", r"data\.train: .*copy does not exist"),
        (only("x", b""), "", r"data\.train: no samples in .*copy"),
        (lambda folder: [path.unlink() for path in folder.glob("*.tar")], "", "nothing in .*copy can be read; 0"),
        (only("x.tar", b"\x1f\x8b" + bytes(2000)), "", r"nothing .* x\.tar/#0: not an uncompressed tar file"),
        (in_index("000001.tar", "../x.tar"), "", r"index\.json is not a shard index .*'\.\./x\.tar' with 9 samples"),
        (only("index.json", b'{"shardlist": []}'), "", r"data\.train: .*index\.json is not a shard index .*; rename"),
        (in_index('"version": 1', '"version": 9'), "", r"index\.json has version 9, this program reads version 1"),
        (in_index('"samples": 9', '"samples": 8'), "", r"holds 9 samples, its index\.json says 8"),
        (lambda folder: None, "/{000000..000003}.tar", r"000003\.tar is missing, 1 of 4 are"),
        (lambda folder: None, "/{x,../copy}/000000.tar", r"must lie in one folder"),
    ],
)
def test_mistakes_get_one_line(copy, break_, pattern, message):
    break_(copy)
    refused(message, lambda: list(module(f"{copy}{pattern}").train_dataloader()))


def test_an_address_with_a_query_is_not_repeated():
    with pytest.raises(UserError, match=r"^shards: https://host/\{0\.\.9\}\.tar\?\.\.\. has a query; .* without$"):
        ShardIndex.load("https://host/{0..9}.tar?secret=1")


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    """Whatever a library makes of it: other users of a cluster read tokens and weights, too."""
    before = os.umask(0o027)
    try:
        write_codes(tmp_path / "x.safetensors", np.zeros((1, 1, 4), np.uint16), np.zeros(1, np.int64), ["a"], {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
