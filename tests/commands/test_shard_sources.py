"""`dar shard` reads folders with odd names and links, images that cannot be used, and shards of others."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folders import COUNTS, encoded, read, write_images, write_tree
from PIL import Image
from tiny_shards import write_tar

from dar_lightning.commands.shard import shard
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "in")


def skipped(folder: Path, by: str) -> dict[str, str]:
    """Name or key -> reason."""
    return {each[by]: each["reason"] for each in json.loads((folder / "skipped.json").read_text())}


def test_names_and_kinds_of_files(tmp_path):
    """The extension is that of the content; keys are plain words and unique."""
    names = ["b.1", "b.2", "b_1", "x/y..z w", "x-y..z w", "q" * 120, "ü"]
    contents = {f"a/{name}.jpg": encoded(number) for number, name in enumerate(names)}
    kinds = {"png.JPEG": encoded(7, "PNG"), "cmyk.jpg": encoded(8, mode="CMYK"), "webp.webp": encoded(9, "WEBP")}
    contents |= {f"a/{name}": content for name, content in kinds.items()}
    bitmap = encoded(10, "BMP")
    shard(str(write_images(tmp_path / "in", contents | {"a/x.bmp": bitmap})), str(tmp_path / "out"), workers=1)
    samples = {json.loads(sample["json"])["name"]: sample for sample in read(tmp_path / "out")}
    stored = samples.pop("a/x.bmp")["png"]  # no loader of shards knows .bmp, so the same pixels become a PNG
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(content))) for content in (stored, bitmap)))
    extensions = {"a/png.JPEG": "png", "a/webp.webp": "webp"}
    assert {name: sample[extensions.get(name, "jpg")] for name, sample in samples.items()} == contents
    keys = [sample["__key__"] for sample in samples.values()]
    assert len(set(keys)) == len(contents)
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys), keys
    assert sorted(keys)[:4] == ["a-_", "a-b_1", "a-b_1-2", "a-b_2"]


def test_links_hidden_folders_and_what_is_no_image(tree, tmp_path, capsys):
    """A link upwards is not followed; one to a folder elsewhere is a folder."""
    write_images(tmp_path / "more", {"new.jpg": encoded(99, "JPEG")})
    (tree / "apple" / "up").symlink_to(tree / "apple", target_is_directory=True)
    (tree / "apple" / "more").symlink_to(tmp_path / "more", target_is_directory=True)
    shutil.copytree(tree / "fig", tree / "plum" / ".thumbnails")
    (tree / "fig" / "notes.txt").write_text("figs")
    (tree / "apple" / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tree / "apple" / "pipe.png")
    shard(str(tree), str(tmp_path / "out"), max_bad_share=0.5, workers=1)
    assert len(read(tmp_path / "out")) == sum(COUNTS) + 1
    assert "1 files are not named like images and left out: 'fig/notes.txt'" in capsys.readouterr().out
    assert skipped(tmp_path / "out", "name") == {
        "apple/dangling.png": "cannot be read: No such file or directory",
        "apple/pipe.png": "not a file",
    }


def test_bad_images_are_counted_and_named_and_too_many_stop_it(tree, tmp_path, capsys):
    (tree / "apple" / "0003.jpg").write_bytes(b"")
    (tree / "fig" / "0001.jpg").write_bytes(encoded(1, size=(300, 200))[:-2000])
    (tree / "plum" / "0005.jpg").write_bytes(b"<html>404</html>")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"^max_bad_share is 0\.1, but 3 of 22 images cannot be used.*$"):
        shard(str(tree), str(out), max_per_shard=8, max_bad_share=0.1, workers=1)
    assert not (out / "index.json").exists()
    shard(str(tree), str(out), max_per_shard=8, max_bad_share=0.2, workers=1)
    said = capsys.readouterr().out
    found = json.loads((out / "skipped.json").read_text())
    assert {each["name"] for each in found} == {"apple/0003.jpg", "fig/0001.jpg", "plum/0005.jpg"}
    assert "3 of 22 images skipped" in said
    assert all(f"{each['shard']}/{each['key']}: {each['reason']}" in said for each in found)
    index = json.loads((out / "index.json").read_text())
    assert index["samples"] == len(read(out)) == 19
    places = [each["shard"] for each in found]
    assert sum(each["samples"] + places.count(each["name"]) for each in index["shards"]) == 22


def test_packing_shards_anew_keeps_everything(tree, tmp_path):
    shard(str(tree), str(tmp_path / "one"), max_per_shard=4, workers=1)
    shard(str(tmp_path / "one"), str(tmp_path / "two"), max_per_shard=9, seed=3, workers=1)
    shard(str(tmp_path / "two"), str(tmp_path / "back"), max_per_shard=4, workers=1)
    assert len(list((tmp_path / "two").glob("*.tar"))) == 3
    for path in (tmp_path / "one").iterdir():
        if path.name not in ("plan.json", ".lock"):
            assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_shards_of_others(tmp_path):
    """Other members and foreign keys survive, and names longer than a tar's header; there is no index."""
    long, jpeg = ("k" * 80, "segmentation-of-the-foreground.v2.png"), encoded(0)
    members = {"a/b.jpeg": jpeg, "a/b.cls": b"1\n", "a/b.txt": b"words", "a/b.mask.png": b"any"}
    members |= {f"{long[0]}.png": encoded(1, "PNG"), f"{long[0]}.cls": b"0", ".".join(long): b"mask"}
    write_tar(tmp_path / "x.tar", list(members.items()))
    shard(str(tmp_path / "x.tar"), str(tmp_path / "out"), seed=None, workers=1)
    first, second = read(tmp_path / "out")
    found = {name: content for name, content in first.items() if not name.startswith("__")}
    assert json.loads(found.pop("json")) == {"name": "x.tar/a/b"}
    assert found == {"jpg": jpeg, "cls": b"1", "txt": b"words", "mask.png": b"any"}
    assert (first["__key__"], second["__key__"]) == ("a_b", long[0])
    assert (second["png"], second[long[1]]) == (encoded(1, "PNG"), b"mask")
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == []


def test_shards_with_bad_samples(tmp_path):
    samples = [(f"s{i}", {"png": encoded(i, "PNG"), "cls": str(i % 3).encode()}) for i in range(6)]
    changes = {1: {"cls": b"-1"}, 2: {"cls": b"9" * 5000}, 3: {"cls": None}, 4: {"png": None}, 5: {"png": b"\0" * 99}}
    for number, change in changes.items():
        members = samples[number][1] | change
        samples[number] = samples[number][0], {name: value for name, value in members.items() if value is not None}
    write_shard(tmp_path / "in" / "0.tar", samples)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), max_bad_share=1, seed=None, workers=1)
    assert [each["__key__"] for each in read(tmp_path / "out")] == ["s0"]
    parts = {"s1": "'-1'", "s2": f"'{'9' * 20}'", "s3": "no .cls member", "s4": "no image", "s5": "not an image"}
    reasons = skipped(tmp_path / "out", "key")
    assert reasons.keys() == parts.keys()
    assert all(part in reasons[key] for key, part in parts.items())


def test_damaged_shards_are_packed_anew_as_far_as_they_go(tmp_path):
    """One cut in the middle, one that an index names in vain, one with a damaged header, alone as in its folder."""
    for which in range(3):
        samples = [(f"s{which}{i}", {"png": encoded(i, "PNG"), "cls": b"1"}) for i in range(6)]
        write_shard(tmp_path / "in" / f"{which}.tar", samples)
    shard(str(tmp_path / "in"), str(tmp_path / "mid"), max_per_shard=6, seed=None, workers=1)
    cut, gone, header = sorted((tmp_path / "mid").glob("*.tar"))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 // 512 * 512])
    gone.unlink()
    shard(str(tmp_path / "mid"), str(tmp_path / "out"), max_bad_share=1, seed=None, workers=1)
    packed = [each["__key__"] for each in read(tmp_path / "out")]
    left = len(packed) - 6
    assert 0 < left < 6
    assert packed == [*(f"s0{i}" for i in range(left)), *(f"s2{i}" for i in range(6))]
    reasons = [each["reason"] for each in json.loads((tmp_path / "out" / "skipped.json").read_text())]
    assert len(reasons) == 12 - left
    assert reasons.count("the file is missing") == 6

    content = bytearray(header.read_bytes())
    content[148] ^= 1  # of the checksum
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.tar").write_bytes(content)
    for name in ("folder", "folder/x.tar"):
        output = tmp_path / "packed" / name.replace("/", "-")
        shard(str(tmp_path / name), str(output), max_bad_share=0.5, workers=1)
        assert len(read(output)) == 5
