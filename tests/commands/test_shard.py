"""`dar shard` on real files and their captions: what goes in comes out, and one line for each mistake."""

import hashlib
import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from image_folders import CLASSES, COUNTS, encoded, files, read, write_images, write_tree
from PIL import Image
from refusals import refusal, refused

from dar_lightning.commands.shard import shard
from dar_lightning.data.captions import read_captions
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.errors import UserError


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
        line = refusal(capsys, ["shard", "--input", other, "--output", output])
        assert f"output: {output} is input or lies in it" in line
    assert files(tmp_path) == before
    (tmp_path / "out" / "plan.json").write_text("[1]")
    assert "plan.json holds a list" in refusal(capsys, ["shard", *command, tree, "--size", 20])
    (tmp_path / "out" / "plan.json").unlink()
    assert "holds shards from elsewhere" in refusal(capsys, ["shard", *command, tree, "--size", 20])
    shard(str(other), str(tmp_path / "other-shards"), workers=1)  # beside it


QUIET = {"workers": 1, "seed": None}


def captions(folder) -> dict[str, list[str] | None]:
    return {sample["__key__"]: json.loads(sample["json"]).get("captions") for sample in read(folder)}


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"json": b'{"captions": ["a", " b "], "caption": "c"}', "txt": b"d"}, ["a", "b"]),
        ({"json": b'{"caption": "c"}', "txt": b"d"}, ["c"]),
        ({"json": b"[1]", "txt": b"d\n\ne\n"}, ["d", "e"]),
        ({"json": b"{", "1.txt": b"g", "0.txt": b"f"}, ["f", "g"]),
        ({"json": b'{"caption": 3}'}, []),
    ],
)
def test_where_captions_are(members, found):
    assert read_captions(members) == found


def test_files_beside_images_of_classes(tmp_path, capsys):
    tree = write_tree(tmp_path / "tree", counts=(2, 1, 1))
    texts = {"apple/0000.txt": b"a red apple\nfruit\n", "fig/0000.json": b'{"caption": "a fig", "shop": 3}'}
    write_images(tree, texts | {"plum/notes.txt": b"no image's"})
    shard(str(tree), str(tmp_path / "out"), **QUIET)
    said = capsys.readouterr().out
    assert "4 images of 3 classes, 2 with captions" in said
    assert "1 files are not named like images and left out: 'plum/notes.txt'" in said
    expected = {"apple-0000": ["a red apple", "fruit"], "apple-0001": None, "fig-0000": ["a fig"], "plum-0000": None}
    assert captions(tmp_path / "out") == expected
    assert [int(sample["cls"]) for sample in read(tmp_path / "out")] == [0, 0, 1, 2]

    write_images(tree, {"apple/0000.txt": b"another"})
    refused(r"output: .* choose another folder", shard, str(tree), str(tmp_path / "out"), **QUIET)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_images_without_labels(tmp_path, kind):
    rows = [("0.jpg", "one, two"), ("sub/1.jpg", "three"), ("0.jpg", "again")]
    table = "\n".join(["file_name,text", *(f'{name},"{text}"' for name, text in rows)])
    lines = "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in rows)
    folder = write_images(tmp_path / "in", {name: encoded(i) for i, name in enumerate(["0.jpg", "sub/1.jpg", "2.jpg"])})
    write_images(folder, {f"metadata.{kind}": (table if kind == "csv" else lines).encode()})
    shard(str(folder), str(tmp_path / "out"), unlabelled=True, **QUIET)
    assert captions(tmp_path / "out") == {"0": ["one, two", "again"], "2": None, "sub-1": ["three"]}
    assert not any("cls" in sample for sample in read(tmp_path / "out"))

    # and these, packed anew, keep all: the same bytes
    shard(str(tmp_path / "out"), str(tmp_path / "again"), **QUIET)
    shards = files(tmp_path / "out")["000000.tar"], files(tmp_path / "again")["000000.tar"]
    assert shards[0] == shards[1]


def test_a_field_of_ones_own(tmp_path):
    shard("data/fruit64/val", str(tmp_path / "out"), captions="coarse", **QUIET)
    found = captions(tmp_path / "out")
    assert len(found) == 207
    assert found["granny-smith-0087"] == ["Apple"]


def test_photos_without_labels_train_a_tokenizer(tmp_path, capsys):
    folder = write_images(tmp_path / "in", {f"{i}.jpg": encoded(i) for i in range(4)})
    shard(str(folder), str(tmp_path / "out"), **QUIET)
    assert "4 images without labels" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/index.json").read_text())["labelled"] is False
    options = dict(train=str(tmp_path / "out"), image_size=16, batch_size=2)
    batches = list(ImageNetDataModule(**options).train_dataloader())
    assert torch.equal(batches[0]["label"], torch.tensor([-1, -1]))
    (tmp_path / "out/index.json").unlink()  # as of another program
    (batch, _) = ImageNetDataModule(**options).train_dataloader()
    assert torch.equal(batch["image"], batches[0]["image"])
    with pytest.raises(UserError, match=r"data\.classes: .*out has no labels, so there is nothing to choose by"):
        ImageNetDataModule(**options, classes=[1]).index("train")
    with pytest.raises(UserError, match=r"data\.num_classes: the shards have no labels"):
        _ = ImageNetDataModule(**options).num_classes


def test_columns_of_a_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [encoded(i) for i in range(3)], "text": ["a", None, "c"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "in"))
    shard(str(tmp_path / "in"), str(tmp_path / "out"), **QUIET)
    assert [*captions(tmp_path / "out").values()] == [["a"], None, ["c"]]
    with pytest.raises(UserError, match=r"captions: .* has no column 'words' among image, text"):
        shard(str(tmp_path / "in"), str(tmp_path / "out2"), captions="words", **QUIET)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("file_name,text\n7.jpg,x\n", "metadata of .* names '7.jpg', which is no image there"),
        ("file_name,words\n0.jpg,x\n", "has no captions: it needs columns file_name and captions or caption or text"),
        ("name,text\n0.jpg,x\n", "has a row without file_name"),
    ],
)
def test_tables_that_are_refused(tmp_path, table, said):
    folder = write_images(tmp_path / "in", {"0.jpg": encoded(0), "metadata.csv": table.encode()})
    refused(said, shard, str(folder), str(tmp_path / "out"), **QUIET)


def test_labels_and_none_at_once(tmp_path):
    with pytest.raises(UserError, match="unlabelled is set, and so is labels or classes"):
        shard(str(write_tree(tmp_path / "tree")), str(tmp_path / "out"), unlabelled=True, classes="apple")
