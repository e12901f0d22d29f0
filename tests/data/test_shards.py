"""Shards on disk: carried to and from webdataset, rebuilt to the same bytes; damaged tars."""

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
from refusals import refused
from tiny_shards import CLASSES, SIZES, module, sample, validated, write_set, write_tar

from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.tar import read_headers
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
    refused(
        r"0\.tar: two samples have the key photo-000",
        lambda: write_shard(tmp_path / "0.tar", [sample(0), sample(1), sample(0)]),
    )
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


def good(path: Path) -> list[str]:
    """Keys of the samples that can be used."""
    samples = read_headers(path).samples
    return [sample.key for sample in samples if not sample.flaw and {"png", "cls"} <= sample.members.keys()]


def test_a_tar_cut_anywhere(tmp_path):
    """At every block, one byte before and after it, and somewhere inside."""
    path = tmp_path / "0.tar"
    write_shard(path, map(sample, range(3)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {member.name.partition(".")[0]: member.offset_data + member.size for member in tar}
    content = max(ends.values())
    for cut in sorted({max(0, block + more) for block in range(0, len(whole), 512) for more in (-1, 0, 1, 201)}):
        path.write_bytes(whole[:cut])
        assert good(path) == [key for key, end in ends.items() if end <= cut], cut
        assert (read_headers(path).damage != "") == (cut < -(-content // 512) * 512 + 512), cut


@pytest.mark.parametrize("indexed", [True, False])
def test_samples_lost_with_the_end_are_counted(tmp_path, indexed):
    names = write_set(tmp_path, (2, 3))
    path = tmp_path / "000001.tar"
    if not indexed:
        (tmp_path / "index.json").unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    data = module(tmp_path, max_bad_share=0.9)
    assert validated(data) == names[:3]
    reasons = ["the tar file ends inside of it", "the tar file breaks off"]  # without an index, one is lost at least
    assert list(data.skipped["val"].values()) == reasons


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (None, "the file is missing"),
        (b"", "not an uncompressed tar file"),
        (bytes(5000), "the tar holds 0 samples only"),
        (b"not a tar" * 1000, "not an uncompressed tar file"),
        (Path.mkdir, "it is not a file"),
        (os.mkfifo, "it is not a file"),  # to open it would wait for ever
    ],
    ids=["missing", "nothing", "zeros", "text", "folder", "pipe"],
)
def test_files_that_are_no_shards(tmp_path, what, reason):
    names = write_set(tmp_path, (2, 3))
    path = tmp_path / "000001.tar"
    path.unlink()
    if what is not None:
        path.write_bytes(what) if isinstance(what, bytes) else what(path)
    data = module(tmp_path, max_bad_share=0.9)
    assert validated(data) == names[:2]
    assert data.skipped["val"] == {f"000001.tar/#{number}": reason for number in range(3)}


@pytest.mark.parametrize("key", ["{:03d}", "{:03d}" + "x" * 150], ids=["short", "long"])
def test_a_bit_in_any_header_of_webdataset_costs_two_samples_at_most(tmp_path, key):
    """In any of a member's blocks that are not its content: header, extended header, and what that holds."""
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as writer:  # extended headers, since times are fractions
        for number in range(8):
            writer.write({"__key__": key.format(number)} | sample(number)[1])
    names = [key.format(number) for number in range(8)]
    assert good(path) == names
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert min(member.offset_data - member.offset for member in members) >= 3 * 512
    for member in members:
        places = np.random.default_rng(member.offset).integers((member.offset, 0), (member.offset_data, 8), (12, 2))
        for byte, bit in places:
            path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
            found, contents = good(path), read_headers(path)
            assert len(set(names) - set(found)) <= 2, (byte, bit)
            assert len(set(found) - set(names)) <= 1, (byte, bit)  # a name that is another now
            bad = [each for each in contents.samples if each.flaw or len(each.members) < 2]
            assert set(names) <= set(found) or bad or contents.damage, (byte, bit)


def test_a_damaged_name_leaves_the_others_their_numbers(tmp_path):
    """Two samples of one: in a shard with an index, these go last."""
    names = write_set(tmp_path, (5,))
    path = tmp_path / "000000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        content[tar.getmember("photo-002.png").offset + 10] ^= 255
    path.write_bytes(content)
    data = module(tmp_path, max_bad_share=0.9)
    assert validated(data) == [*names[:2], *names[3:]]
    assert data.skipped["val"] == {"000000.tar/photo-002": "no image (jpg, jpeg, png, webp)"}
    assert "damaged at byte" in read_headers(path).damage


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "bad",
    [header(kind, size) for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE) for size in (2**50, 2**21)]
    # `tarfile` of Python 3.11 goes back by a negative size, and round in circles
    + [header(tarfile.REGTYPE, -2048, "a.cls")],
    ids=["long name, 2**50", "long name, 2**21", "extended, 2**50", "extended, 2**21", "negative"],
)
def test_a_header_of_impossible_size(tmp_path, bad):
    path = tmp_path / "0.tar"
    write_shard(path, map(sample, range(3)))
    with tarfile.open(path) as tar:
        place = tar.getmember("photo-002.png").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bad + whole[place:])
    assert good(path) == ["photo-000", "photo-001", "photo-002"]
    assert read_headers(path).damage == f"a header is damaged at byte {place}"


def test_a_name_that_is_too_long(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", b""), ("a.cls", b""), ("y" * 5000 + ".cls", b"")])
    samples, damage = read_headers(tmp_path / "0.tar")
    assert [(each.key, each.flaw) for each in samples] == [("a", ""), ("y" * 4096, "its name is too long")]
    assert damage == ""


def test_a_file_that_cannot_be_read_now_is_no_damage(tmp_path, monkeypatch):
    """Too many open files, say: to skip its samples would be to lose them."""
    write_set(tmp_path, (5,))
    loader = module(tmp_path, max_bad_share=1).val_dataloader()

    def fails(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(type(tmp_path), "open", fails)
    refused(r"000000\.tar cannot be read \(Too many open files\)", list, loader)


def test_tars_that_are_in_order(tmp_path):
    """A header of all files, long names, folders, two tars in one: no damage."""
    content = io.BytesIO()
    for name in ("a", "b"):
        with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for member in (f"folder/{name}.png", f"folder/{name * 200}.png", "README", "folder/.hidden"):
                tar.addfile(tarfile.TarInfo(member))
    (tmp_path / "0.tar").write_bytes(content.getvalue())
    samples, damage = read_headers(tmp_path / "0.tar")
    assert damage == ""
    assert [each.key for each in samples] == ["folder/a", f"folder/{'a' * 200}", "folder/b", f"folder/{'b' * 200}"]
