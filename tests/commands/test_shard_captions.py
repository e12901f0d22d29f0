"""`dar shard` of captions and of images without labels: from files beside images, tables, shards and HF data sets."""

import json

import pytest
import torch
from image_folders import encoded, files, read, write_images, write_tree
from refusals import refused

from dar_lightning.commands.shard import shard
from dar_lightning.data.captions import read_captions
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.errors import UserError

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
