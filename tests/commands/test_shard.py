"""`dar shard` on real files: what goes in comes out, whatever happens in between."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from image_folders import CLASSES, COUNTS, encoded, files, process, read, write_tree
from PIL import Image

from dar_lightning.cli import main
from dar_lightning.commands.shard import shard
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree") / "x")


# ---- what is in the shards


def test_bytes_labels_names_and_index(tree, tmp_path):
    shard(str(tree), str(tmp_path / "out"), max_per_shard=8, workers=1)
    samples = read(tmp_path / "out")
    found = {}
    for sample in samples:
        about = json.loads(sample["json"])
        found[about["name"]] = (sample["jpg"], sample["cls"].decode(), about["class"], sample["__key__"])
    expected = {}
    for path in tree.glob("*/*.jpg"):
        name = path.parent.name
        expected[f"{name}/{path.name}"] = (
            path.read_bytes(),
            str(sorted(CLASSES).index(name)),
            name,
            f"{name}-{path.stem}",
        )
    assert found == expected
    assert len(samples) == sum(COUNTS)

    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["classes"], index["samples"]) == (list(CLASSES), sum(COUNTS))
    assert [each["samples"] for each in index["shards"]] == [8, 8, 6]
    for each in index["shards"]:
        path = tmp_path / "out" / each["name"]
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert (each["sha256"], each["bytes"]) == (digest, path.stat().st_size)
    first = {sample["cls"] for sample in samples[:8]}
    assert first == {b"0", b"1", b"2"}, "the classes are mixed in every shard"


def test_the_datamodule_reads_them(tree, tmp_path):
    shard(str(tree), str(tmp_path / "out"), max_per_shard=8, workers=1)
    data = ImageNetDataModule(val=str(tmp_path / "out"), image_size=16, batch_size=22)
    (batch,) = data.val_dataloader()
    assert Counter(batch["label"].tolist()) == dict(enumerate(COUNTS))
    assert data.num_classes == 3


def adm_resize(image: Image.Image, size: int) -> np.ndarray:
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    return np.asarray(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC))


def test_short_side_and_never_larger(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    contents = {
        "large": encoded(0, "JPEG", (130, 90)),
        "tall": encoded(1, "PNG", (50, 75)),
        "equal": encoded(2, "JPEG", (60, 32)),
        "small": encoded(3, "PNG", (20, 40)),
    }
    for name, content in contents.items():
        (tmp_path / "in" / "a" / f"{name}.jpg").write_bytes(content)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), size=32, workers=1)
    found = {sample["__key__"].removeprefix("a-"): sample for sample in read(tmp_path / "out")}
    assert found["equal"]["jpg"] == contents["equal"]
    assert found["small"]["png"] == contents["small"]
    for name, size in {"large": (46, 32), "tall": (32, 48)}.items():
        image = Image.open(io.BytesIO(found[name]["jpg"]))
        assert (image.size, image.format) == (size, "JPEG")
        error = np.asarray(image).astype(int) - adm_resize(Image.open(io.BytesIO(contents[name])).convert("RGB"), 32)
        assert np.abs(error).mean() < 2


def test_quality_reaches_the_encoder(tree, tmp_path):
    sizes = []
    for quality in (30, 95):
        shard(str(tree), str(tmp_path / str(quality)), size=24, quality=quality, workers=1)
        sizes.append(sum(len(sample["jpg"]) for sample in read(tmp_path / str(quality))))
    assert sizes[0] < sizes[1]


def test_the_extension_is_that_of_the_content(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    contents = {
        "png.JPEG": encoded(0, "PNG"),
        "cmyk.jpg": encoded(1, "JPEG", mode="CMYK"),
        "webp.webp": encoded(2, "WEBP"),
        "bitmap.bmp": encoded(3, "BMP"),
    }
    for name, content in contents.items():
        (tmp_path / "in" / "a" / name).write_bytes(content)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), workers=1)
    found = {sample["__key__"].removeprefix("a-"): sample for sample in read(tmp_path / "out")}
    assert found["png"]["png"] == contents["png.JPEG"]
    assert found["cmyk"]["jpg"] == contents["cmyk.jpg"]
    assert found["webp"]["webp"] == contents["webp.webp"]
    # no loader of shards knows .bmp, so the same pixels become a PNG
    pixels = [np.asarray(Image.open(io.BytesIO(c))) for c in (found["bitmap"]["png"], contents["bitmap.bmp"])]
    assert np.array_equal(*pixels)


def test_keys_are_plain_words_and_unique(tmp_path):
    names = [
        "a/b.1.jpg",
        "a/b.2.jpg",
        "a/b_1.jpg",
        "a/x/y..z w.jpg",
        "a/x-y..z w.jpg",
        "a/" + "q" * 120 + ".jpg",
        "a/ü.jpg",
    ]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(encoded(number))
    shard(str(tmp_path / "in"), str(tmp_path / "out"), workers=1)
    samples = {json.loads(sample["json"])["name"]: sample for sample in read(tmp_path / "out")}
    assert {name: sample["jpg"] for name, sample in samples.items()} == {
        name: (tmp_path / "in" / name).read_bytes() for name in names
    }
    keys = [sample["__key__"] for sample in samples.values()]
    assert len(set(keys)) == len(names)
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in keys), keys
    assert sorted(keys)[:4] == ["a-_", "a-b_1", "a-b_1-2", "a-b_2"]


def test_files_that_are_no_images_are_mentioned(tree, tmp_path, capsys):
    copy = shutil.copytree(tree, tmp_path / "in")
    (copy / "fig" / "notes.txt").write_text("figs")
    shard(str(copy), str(tmp_path / "out"), workers=1)
    assert "1 files are not named like images and left out: 'fig/notes.txt'" in capsys.readouterr().out
    assert len(read(tmp_path / "out")) == sum(COUNTS)


@pytest.mark.parametrize("from_file", [False, True])
def test_classes_choose_and_order(tree, tmp_path, from_file):
    (tmp_path / "names.txt").write_text("plum\napple\n")
    wanted = str(tmp_path / "names.txt") if from_file else "plum,apple"
    shard(str(tree), str(tmp_path / "out"), classes=wanted, workers=1)
    labels = Counter((json.loads(each["json"])["class"], each["cls"]) for each in read(tmp_path / "out"))
    assert labels == {("plum", b"0"): 10, ("apple", b"1"): 7}
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == ["plum", "apple"]


def test_a_list_of_classes_may_be_longer_than_a_file_name(tmp_path):
    names = [f"n{number:08d}" for number in range(100)]
    for number, name in enumerate(names):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jpg").write_bytes(encoded(number))
    shard(str(tmp_path / "in"), str(tmp_path / "out"), classes=",".join(names), workers=1)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == names


def test_hidden_folders_hold_no_images(tree, tmp_path):
    copy = shutil.copytree(tree, tmp_path / "in")
    shutil.copytree(copy / "fig", tmp_path / "thumbnails")
    shutil.move(tmp_path / "thumbnails", copy / "fig" / ".thumbnails")
    shard(str(copy), str(tmp_path / "out"), workers=1)
    assert len(read(tmp_path / "out")) == sum(COUNTS)


def test_links_in_circles(tree, tmp_path):
    """A link upwards is followed once; one to a folder elsewhere is a folder."""
    folder = tmp_path / "in"
    shutil.copytree(tree, folder)
    elsewhere = tmp_path / "more"
    elsewhere.mkdir()
    (elsewhere / "new.jpg").write_bytes(encoded(99, "JPEG"))
    (folder / "apple" / "up").symlink_to(folder / "apple", target_is_directory=True)
    (folder / "apple" / "more").symlink_to(elsewhere, target_is_directory=True)
    shard(str(folder), str(tmp_path / "out"), workers=1)
    assert len(read(tmp_path / "out")) == sum(COUNTS) + 1


def test_what_is_no_file_is_skipped(tree, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(tree, folder)
    (folder / "apple" / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "apple" / "pipe.png")
    shard(str(folder), str(tmp_path / "out"), max_bad_share=0.5, workers=1)
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {each["name"]: each["reason"] for each in skipped} == {
        "apple/dangling.png": "cannot be read: No such file or directory",
        "apple/pipe.png": "not a file",
    }
    assert len(read(tmp_path / "out")) == sum(COUNTS)


def test_split_has_the_same_share_of_every_class(tmp_path):
    tree = write_tree(tmp_path / "in", (20, 7, 3))
    shard(str(tree), str(tmp_path / "out"), val_fraction=0.2, max_per_shard=10, workers=1)
    parts = {part: read(tmp_path / "out" / part) for part in ("train", "val")}
    counts = {part: Counter(each["cls"] for each in samples) for part, samples in parts.items()}
    assert counts["val"] == {b"0": 4, b"1": 1, b"2": 1}  # of 4, 1.4 and 0.6
    assert counts["train"] == {b"0": 16, b"1": 6, b"2": 2}
    names = [json.loads(each["json"])["name"] for samples in parts.values() for each in samples]
    assert sorted(names) == sorted(str(path.relative_to(tree)) for path in tree.rglob("*.jpg"))
    shard(str(tree), str(tmp_path / "other"), val_fraction=0.2, seed=1, workers=1)
    chosen = [{each["__key__"] for each in read(tmp_path / name / "val")} for name in ("out", "other")]
    assert chosen[0] != chosen[1]


def test_seed_is_the_order(tree, tmp_path):
    orders = []
    for seed in (0, 1, None):
        shard(str(tree), str(tmp_path / str(seed)), seed=seed, workers=1)
        orders.append([json.loads(each["json"])["name"] for each in read(tmp_path / str(seed))])
    assert orders[2] == sorted(orders[0])
    assert len({tuple(order) for order in orders}) == 3


def test_other_members_and_foreign_keys_survive(tmp_path):
    members = {"jpeg": encoded(0), "cls": b"1\n", "txt": b"words", "mask.png": b"any"}
    write_shard(tmp_path / "in" / "x.tar", [("a/b", members), ("a/c", {"png": encoded(1, "PNG"), "cls": b"0"})])
    shard(str(tmp_path / "in" / "x.tar"), str(tmp_path / "out"), seed=None, workers=1)
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}
    assert {name: content for name, content in found.items() if name.startswith("a_b.") and "json" not in name} == {
        "a_b.jpg": members["jpeg"],
        "a_b.cls": b"1",
        "a_b.txt": b"words",
        "a_b.mask.png": b"any",
    }
    assert json.loads(found["a_b.json"]) == {"name": "x.tar/a/b"}
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == []


def test_names_longer_than_a_header(tmp_path):
    key, extension = "k" * 80, "segmentation-of-the-foreground.v2.png"
    members = {"png": encoded(0, "PNG"), "cls": b"0", extension: b"any"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(f"{key}.{name}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    shard(str(tmp_path / "x.tar"), str(tmp_path / "out"), workers=1)
    (found,) = read(tmp_path / "out")
    assert (found["__key__"], found["png"], found[extension]) == (key, members["png"], b"any")


# ---- images that cannot be used


def bad_tree(folder: Path, tree: Path) -> Path:
    shutil.copytree(tree, folder)
    (folder / "apple" / "0003.jpg").write_bytes(b"")
    (folder / "fig" / "0001.jpg").write_bytes(encoded(1, size=(300, 200))[:-2000])
    (folder / "plum" / "0005.jpg").write_bytes(b"<html>404</html>")
    return folder


def test_bad_images_are_counted_and_named(tree, tmp_path, capsys):
    bad = bad_tree(tmp_path / "in", tree)
    shard(str(bad), str(tmp_path / "out"), max_per_shard=8, max_bad_share=0.2, workers=1)
    said = capsys.readouterr().out
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {each["name"] for each in skipped} == {"apple/0003.jpg", "fig/0001.jpg", "plum/0005.jpg"}
    assert all(each["reason"] for each in skipped)
    assert "3 of 22 images skipped" in said
    assert all(f"{each['shard']}/{each['key']}" in said for each in skipped)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["samples"] == len(read(tmp_path / "out")) == 19
    places = {each["key"]: each["shard"] for each in skipped}
    assert sum(each["samples"] + list(places.values()).count(each["name"]) for each in index["shards"]) == 22


def test_too_many_bad_images_stop_it(tree, tmp_path):
    bad = bad_tree(tmp_path / "in", tree)
    with pytest.raises(UserError, match=r"max_bad_share is 0\.1, but 3 of 22 images cannot be used") as error:
        shard(str(bad), str(tmp_path / "out"), max_bad_share=0.1, workers=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "index.json").exists()
    shard(str(bad), str(tmp_path / "out"), max_bad_share=0.2, workers=1)
    assert (tmp_path / "out" / "index.json").exists()


def test_shards_with_bad_samples(tmp_path):
    samples = [(f"s{i}", {"png": encoded(i, "PNG"), "cls": str(i % 3).encode()}) for i in range(6)]
    changes = {1: {"cls": b"-1"}, 2: {"cls": b"9" * 5000}, 3: {"cls": None}, 4: {"png": None}, 5: {"png": b"\0" * 99}}
    for number, change in changes.items():
        members = samples[number][1] | change
        samples[number] = samples[number][0], {name: value for name, value in members.items() if value is not None}
    write_shard(tmp_path / "in" / "0.tar", samples)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), max_bad_share=1, seed=None, workers=1)
    reasons = {each["key"]: each["reason"] for each in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    assert [each["__key__"] for each in read(tmp_path / "out")] == ["s0"]
    assert [reasons[f"s{i}"] for i in (1, 2, 3, 4)] == [
        "label '-1'",
        f"label '{'9' * 20}'",
        "no .cls member",
        "no image",
    ]
    assert reasons.keys() == {f"s{i}" for i in changes}


def test_damaged_shards_are_packed_anew_as_far_as_they_go(tmp_path):
    """A shard cut in the middle and one that an index names in vain: what is left is packed, the rest is named."""
    for which in range(3):
        samples = [(f"s{which}{i}", {"png": encoded(i, "PNG"), "cls": b"1"}) for i in range(6)]
        write_shard(tmp_path / "in" / f"{which}.tar", samples)
    shard(str(tmp_path / "in"), str(tmp_path / "mid"), max_per_shard=6, seed=None, workers=1)
    cut, gone, _ = sorted((tmp_path / "mid").glob("*.tar"))
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


# ---- one line for a mistake


def refusal(capsys, *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["shard", *map(str, words)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("dar shard: ")
    return line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--size", 0], "size is 0: must be at least 1"),
        (["--quality", 101], "quality is 101: must be from 1 to 100"),
        (["--max_per_shard", 0], "max_per_shard is 0"),
        (["--val_fraction", 1], "val_fraction is 1.0: must be from 0 to less than 1"),
        (["--val_fraction", 0.001], "val gets none of the 22 images"),
        (["--max_bad_share", 2], "max_bad_share is 2.0"),
        (["--workers", 0], "workers is 0"),
        (["--classes", "apple,kiwi"], "'kiwi' is neither a file nor one of the classes, which are apple, fig, plum"),
        (["--classes", "apple,apple"], "'apple' is there twice"),
        (["--labels", "x.txt"], "only ILSVRC2012_img_val.tar needs them"),
        (["--split", "train"], "only Hugging Face data sets have splits"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_options_that_cannot_be(tree, tmp_path, words, named, capsys):
    assert named in refusal(capsys, "--input", tree, "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be(tree, tmp_path, capsys):
    def said(path: object) -> str:
        line = refusal(capsys, "--input", path, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return line

    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    shutil.copytree(tree, tmp_path / "data" / "train")
    (tmp_path / "x.zip").touch()
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "does not exist; give a folder" in said("no/such/folder")
    assert "is a file of another kind" in said(tmp_path / "x.zip")
    assert "x.tar can be read; x.tar/#0: not an uncompressed tar file" in said(tmp_path / "x.tar")
    assert "holds neither folders of images (one per class) nor .tar files" in said(tree / "apple")
    assert "holds no images" in said(tmp_path / "empty")
    assert "holds train, which are no classes; give one of these" in said(tmp_path / "data")
    assert "https://host/x is an address; copy it to this machine first" in said("https://host/x")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    words = ["--input", tree, "--output", tmp_path / "out", "--classes", tmp_path / "classes.txt"]
    assert "classes.txt is no text file in UTF-8" in refusal(capsys, *words)


def test_an_output_of_something_else(tree, tmp_path, capsys):
    shard(str(tree), str(tmp_path / "out"), size=20, workers=1)
    before = files(tmp_path / "out")
    command = ["--output", tmp_path / "out", "--workers", 1, "--input"]
    assert "was made with size 20, now it is 16" in refusal(capsys, *command, tree, "--size", 16)
    assert "was made with seed 0, now it is None" in refusal(capsys, *command, tree, "--size", 20, "--seed", "null")
    other = write_tree(tmp_path / "other", (7, 5, 9))
    assert "was made from another input" in refusal(capsys, *command, other, "--size", 20)
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "plan.json").write_text("[1]")
    assert "plan.json is not readable" in refusal(capsys, *command, tree, "--size", 20)
    (tmp_path / "out" / "plan.json").unlink()
    assert "holds shards from elsewhere" in refusal(capsys, *command, tree, "--size", 20)


def test_an_output_inside_of_the_input(tmp_path, capsys):
    """It would be a part of the input when the command is repeated."""
    tree = write_tree(tmp_path / "in")
    before = files(tmp_path)
    (tmp_path / "link").symlink_to(tree)
    for output in (tree, tree / "apple", tree / "shards" / "new", tmp_path / "link" / "x", tree / ".." / "in"):
        assert f"output: {output} is input or lies in it" in refusal(capsys, "--input", tree, "--output", output)
    assert files(tmp_path) == before
    shard(str(tree), str(tmp_path / "in-shards"), workers=1)  # beside it


def test_a_damaged_shard_alone_is_treated_as_in_a_folder(tmp_path):
    """Its first header is damaged."""
    shard(str(write_tree(tmp_path / "in")), str(tmp_path / "shards"), workers=1)
    path = tmp_path / "shards" / "000000.tar"
    content = bytearray(path.read_bytes())
    content[148] ^= 1  # of the checksum
    path.write_bytes(content)
    (tmp_path / "shards" / "index.json").unlink()
    for name, source in (("folder", path.parent), ("alone", path)):
        shard(str(source), str(tmp_path / name), max_bad_share=0.1, workers=1)
    assert (tmp_path / "alone" / "000000.tar").read_bytes() == (tmp_path / "folder" / "000000.tar").read_bytes()
    assert len(read(tmp_path / "alone")) == sum(COUNTS) - 1


def test_a_refusal_in_a_real_process(tree, tmp_path):
    run = process("--input", tree, "--output", tmp_path / "out", "--classes", "kiwi")
    out, err = run.communicate()
    assert (run.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("dar shard: classes: 'kiwi'")
