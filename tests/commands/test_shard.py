"""`dar shard` on real files: what goes in comes out, and one line for each mistake."""

import io
import json
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from image_folders import CLASSES, COUNTS, encoded, files, read, write_images, write_tree
from PIL import Image

from dar_lightning.cli import main
from dar_lightning.commands.shard import shard
from dar_lightning.data.imagenet import ImageNetDataModule


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree") / "x")


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
        path = tmp_path / "out" / each["name"]
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
        assert (each["sha256"], each["bytes"]) == (digest, path.stat().st_size)
    data = ImageNetDataModule(val=str(tmp_path / "out"), image_size=16, batch_size=22)
    (batch,) = data.val_dataloader()
    assert Counter(batch["label"].tolist()) == dict(enumerate(COUNTS))


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


@pytest.mark.parametrize("given", ["comma", "file"])
def test_classes_choose_and_order(tmp_path, given):
    """A list of them may be longer than a file name."""
    names = [f"n{number:08d}" for number in range(0, 200, 2)]
    source = write_images(tmp_path / "in", {f"n{number:08d}/a.jpg": encoded(number) for number in range(200)})
    wanted = names[::-1]
    (tmp_path / "names.txt").write_text("\n".join(wanted) + "\n")
    classes = ",".join(wanted) if given == "comma" else str(tmp_path / "names.txt")
    shard(str(source), str(tmp_path / "out"), classes=classes, workers=1)
    labels = {json.loads(each["json"])["class"]: int(each["cls"]) for each in read(tmp_path / "out")}
    assert labels == {name: label for label, name in enumerate(wanted)}
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == wanted


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
        (["--val_fraction", 1], "val_fraction is 1.0: must be from 0 to less than 1"),
        (["--val_fraction", 0.001], "val gets none of the 22 images"),
        (["--max_bad_share", 2], "max_bad_share is 2.0"),
        (["--classes", "apple,kiwi"], "'kiwi' is neither a file nor one of the classes, which are apple, fig, plum"),
        (["--classes", "apple,apple"], "'apple' is there twice"),
        (["--classes", "BINARY"], "classes.txt is no text file in UTF-8"),
        (["--labels", "x.txt"], "only ILSVRC2012_img_val.tar needs them"),
        (["--split", "train"], "only Hugging Face data sets have splits"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_options_that_cannot_be(tree, tmp_path, words, named, capsys):
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    words = [tmp_path / "classes.txt" if word == "BINARY" else word for word in words]
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


def test_an_output_of_something_else(tree, tmp_path, capsys):
    shard(str(tree), str(tmp_path / "out"), size=20, workers=1)
    before = files(tmp_path / "out")
    command = ["--output", tmp_path / "out", "--workers", 1, "--input"]
    assert "was made with size 20, now it is 16" in refusal(capsys, *command, tree, "--size", 16)
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
