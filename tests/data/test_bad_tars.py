"""Tars that are cut, damaged or something else, as real bytes: what is good in them is delivered."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from damaged import BOTH, module, validated, write_set, write_tar
from tiny_shards import CLASSES, sample

from dar_lightning.data import shards
from dar_lightning.data.shards import Shard, ShardIndex, write_shard
from dar_lightning.data.tar import read_headers
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256

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
    entry = Shard(path.name, 12, path.stat().st_size, file_sha256(path))
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
