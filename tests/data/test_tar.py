"""Tars that are cut, damaged or something else: what is good in them is found, and no more is lost than was hit."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import module, sample, validated, write_set, write_tar

from dar_lightning.data.shards import write_shard
from dar_lightning.data.tar import read_headers


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

    def refused(*arguments, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(type(tmp_path), "open", refused)
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
