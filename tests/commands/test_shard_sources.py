"""`dar shard` reads folders with odd names and links, images that cannot be used, shards of others; and is killed."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from image_folders import COUNTS, encoded, files, process, read, write_images, write_tree
from PIL import Image
from tiny_shards import write_tar

from dar_lightning.commands.shard import shard
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError
from dar_lightning.files import locked


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


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers(tmp_path):
    """SIGKILL in the middle; then the bytes are those of an unbroken run, and finished shards were not made again."""
    tree, out = write_tree(tmp_path / "in", (20, 20, 20), size=(800, 600)), tmp_path / "out"
    options = {"size": 64, "max_per_shard": 3, "val_fraction": 0.1, "max_bad_share": 0.1}
    (tree / "fig" / "0007.jpg").write_bytes(b"no picture")
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run = process("--input", tree, "--output", out, *words, "--workers", 2, start_new_session=True)

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("0*.tar")}

    while len(made()) < 3 and run.poll() is None:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while alive := group(run.pid):
        assert time.monotonic() < deadline, f"its workers live on: {alive}"
        time.sleep(0.05)
    kept = made()
    assert 3 <= len(kept) < 20
    assert not list(out.rglob("index.json"))
    (out / "train" / ".000001.tar.1.part").write_bytes(b"left by a kill")

    shard(str(tree), str(out), **options, workers=1)
    shard(str(tree), str(tmp_path / "unbroken"), **options, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(out) == files(tmp_path / "unbroken")
    assert len(made()) == 20
    assert list(out.rglob("skipped.json"))


def group(leader: int) -> list[int]:
    """Living processes of a group; empty where there is no /proc to look at."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended just now
            continue
        if int(number) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_damaged_shards_are_made_again(tmp_path):
    """And one whose image could not be read the first time and can be read now."""
    tree, out = write_tree(tmp_path / "in"), tmp_path / "out"
    content = (tree / "fig" / "0002.jpg").read_bytes()
    (tree / "fig" / "0002.jpg").write_bytes(bytes(len(content)))
    command = dict(input=str(tree), output=str(out), max_per_shard=4, workers=1, max_bad_share=0.1)
    with locked(out, "output"), pytest.raises(UserError, match="another process is writing to"):
        shard(**command)
    shard(**command)
    before = files(out)
    assert "skipped.json" in before
    cut, gone, other, empty, changed, whole = sorted(out.glob("*.tar"))
    cut.write_bytes(cut.read_bytes()[:4096])
    gone.unlink()
    other.write_bytes(empty.read_bytes())
    empty.write_bytes(b"")
    flipped = bytearray(changed.read_bytes())
    flipped[2000] ^= 1  # inside of a member: names, sizes and the end mark stay, the index knows the hash
    changed.write_bytes(flipped)
    time_before = whole.stat().st_mtime_ns
    shard(**command)
    assert files(out) == before
    assert whole.stat().st_mtime_ns == time_before
    (tree / "fig" / "0002.jpg").write_bytes(content)
    shard(**command)
    assert len(read(out)) == sum(COUNTS)
    assert not (out / "skipped.json").exists()


@pytest.mark.slow
def test_interrupted_while_its_workers_start(tmp_path):
    """Ctrl-C reaches the whole process group, the forkserver too; it says one line."""
    words = ["--input", write_tree(tmp_path / "in"), "--output", tmp_path / "out", "--workers", 2]
    run = process(*words, "--max_per_shard", 9, start_new_session=True)
    while len(group(run.pid)) < 3 and run.poll() is None:  # itself, the resource tracker and the forkserver
        time.sleep(0.001)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in err
