"""`dar shard` on real files: what goes in comes out, and one line for each mistake."""

import hashlib
import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from image_folders import CLASSES, COUNTS, encoded, files, read, write_images, write_tree
from PIL import Image
from refusals import refusal

from dar_lightning.commands.shard import shard


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree") / "x")


def names(folder) -> list[str]:
    return [json.loads(sample["json"])["name"] for sample in read(folder)]


def test_bytes_labels_names_and_index(tree, tmp_path):
    shard(str(tree), str(tmp_path / "out"), max_per_shard=8, workers=1)
    samples = read(tmp_path / "out")
    found = {}
    for sample in samples:
        about = json.loads(sample["json"])
        found[about["name"]] = (sample["jpg"], sample["cls"].decode(), about["class"], sample["__key__"])
    assert found == {
        f"{name}/{path.name}": (path.read_bytes(), str(label), name, f"{name}-{path.stem}")
        for label, name in enumerate(sorted(CLASSES))
        for path in (tree / name).glob("*.jpg")
    }
    assert len(samples) == sum(COUNTS)
    assert {sample["cls"] for sample in samples[:8]} == {b"0", b"1", b"2"}, "the classes are mixed in every shard"
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["classes"], index["samples"]) == (list(CLASSES), sum(COUNTS))
    assert [each["samples"] for each in index["shards"]] == [8, 8, 6]
    for each in index["shards"]:
        content = (tmp_path / "out" / each["name"]).read_bytes()
        assert (each["sha256"], each["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))


def adm_resize(image: Image.Image, size: int) -> np.ndarray:
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    return np.asarray(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC))


def test_short_side_and_quality(tmp_path):
    contents = {
        "large": encoded(0, "JPEG", (130, 90)),
        "tall": encoded(1, "PNG", (50, 75)),
        "equal": encoded(2, "JPEG", (60, 32)),
        "small": encoded(3, "PNG", (20, 40)),
    }
    source = write_images(tmp_path / "in", {f"a/{name}.jpg": content for name, content in contents.items()})
    found = {}
    for quality in (95, 30):
        shard(str(source), str(tmp_path / str(quality)), size=32, quality=quality, workers=1)
        found[quality] = {each["__key__"].removeprefix("a-"): each for each in read(tmp_path / str(quality))}
    assert found[95]["equal"]["jpg"] == contents["equal"]
    assert found[95]["small"]["png"] == contents["small"], "never enlarged"
    for name, size in {"large": (46, 32), "tall": (32, 48)}.items():
        image = Image.open(io.BytesIO(found[95][name]["jpg"]))
        assert (image.size, image.format) == (size, "JPEG")
        error = np.asarray(image).astype(int) - adm_resize(Image.open(io.BytesIO(contents[name])).convert("RGB"), 32)
        assert np.abs(error).mean() < 2
        assert len(found[30][name]["jpg"]) < len(found[95][name]["jpg"])


def test_classes_choose_and_order(tmp_path):
    """A list of them may be longer than a file name."""
    source = write_images(tmp_path / "in", {f"n{number:08d}/a.jpg": encoded(number) for number in range(60)})
    wanted = [f"n{number:08d}" for number in range(58, -1, -2)]
    (tmp_path / "names.txt").write_text("\n".join(wanted) + "\n")
    for output, classes in (("comma", ",".join(wanted)), ("file", str(tmp_path / "names.txt"))):
        shard(str(source), str(tmp_path / output), classes=classes, workers=1)
        labels = {json.loads(each["json"])["class"]: int(each["cls"]) for each in read(tmp_path / output)}
        assert labels == {name: label for label, name in enumerate(wanted)}
        assert json.loads((tmp_path / output / "index.json").read_text())["classes"] == wanted


def test_seed_decides_the_order_and_the_split(tmp_path):
    """The share for validation is that of every class: of 4, 1.4 and 0.6 images."""
    tree = write_tree(tmp_path / "in", (20, 7, 3))
    everything = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.jpg"))
    orders, chosen = [], []
    for seed in (0, 1, None):
        out = tmp_path / str(seed)
        shard(str(tree), str(out), val_fraction=0.2, max_per_shard=10, seed=seed, workers=1)
        counts = [Counter(each["cls"] for each in read(out / part)) for part in ("train", "val")]
        assert counts == [{b"0": 16, b"1": 6, b"2": 2}, {b"0": 4, b"1": 1, b"2": 1}]
        orders.append(names(out / "train"))
        chosen.append(names(out / "val"))
        assert sorted(orders[-1] + chosen[-1]) == everything
    assert set(chosen[0]) != set(chosen[1])
    assert orders[2] == sorted(orders[2])
    assert orders[0] != sorted(orders[0])


def test_options_and_inputs_that_cannot_be(tree, tmp_path, capsys):
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    shutil.copytree(tree, tmp_path / "data" / "train")
    (tmp_path / "x.zip").touch()
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    for words, named in (
        (["--size", 0], "size is 0: must be at least 1"),
        (["--quality", 101], "quality is 101: must be at least 1, at most 100"),
        (["--val_fraction", 1], "train gets none of the 22 images"),
        (["--val_fraction", 0.001], "val gets none of the 22 images"),
        (["--max_bad_share", 2], "max_bad_share is 2.0"),
        (["--classes", "apple,kiwi"], "'kiwi' is neither a file nor one of the classes, which are apple, fig, plum"),
        (["--classes", "apple,apple"], "'apple' is there twice"),
        (["--classes", tmp_path / "classes.txt"], "classes.txt is no text file in UTF-8"),
        (["--labels", "x.txt"], "only ILSVRC2012_img_val.tar needs them"),
        (["--split", "train"], "only Hugging Face data sets have splits"),
        (["--input", "no/such/folder"], "does not exist; give a folder"),
        (["--input", tmp_path / "x.zip"], "is a file of another kind"),
        (["--input", tmp_path / "x.tar"], "x.tar can be read; x.tar/#0: not an uncompressed tar file"),
        (["--input", tmp_path / "empty" / "class"], "holds neither images or folders of them nor .tar files"),
        (["--input", tmp_path / "empty"], "holds no images"),
        (["--input", tmp_path / "data"], "holds train, which are no classes; give one of these"),
        (["--input", "https://host/x"], "https://host/x is an address; copy it to this machine first"),
    ):
        assert named in refusal(capsys, ["shard", "--input", tree, "--output", tmp_path / "out", *words])
        assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be(tree, tmp_path, capsys):
    """Those of something else; and one inside of the input, a part of it when the command is repeated."""
    shard(str(tree), str(tmp_path / "out"), size=20, workers=1)
    other = write_tree(tmp_path / "other", (7, 5, 9))
    (tmp_path / "link").symlink_to(other)
    before = files(tmp_path)
    command = ["--output", tmp_path / "out", "--workers", 1, "--input"]
    assert "was made with size 20, now it is 16" in refusal(capsys, ["shard", *command, tree, "--size", 16])
    assert "was made from another input" in refusal(capsys, ["shard", *command, other, "--size", 20])
    for output in (other, other / "apple", other / "shards" / "new", tmp_path / "link" / "x", other / ".." / "other"):
        assert f"output: {output} is input or lies in it" in refusal(
            capsys, ["shard", "--input", other, "--output", output]
        )
    assert files(tmp_path) == before
    (tmp_path / "out" / "plan.json").write_text("[1]")
    assert "plan.json holds a list" in refusal(capsys, ["shard", *command, tree, "--size", 20])
    (tmp_path / "out" / "plan.json").unlink()
    assert "holds shards from elsewhere" in refusal(capsys, ["shard", *command, tree, "--size", 20])
    shard(str(other), str(tmp_path / "other-shards"), workers=1)  # beside it
