"""ImageNetDataModule: which classes, which options, and what a resumed run must share."""

import json
import shutil

import pytest
from jsonargparse import ArgumentParser
from refusals import refused
from tiny_shards import module, sample, write_set

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError


@pytest.mark.parametrize(("chosen", "numbers"), [(["d", "b"], (3, 1)), ([2], (2,)), ([1, "a", 3], (1, 0, 3))], ids=str)
def test_classes_are_chosen_and_renumbered(shards, chosen, numbers):
    """Sample n is of class n mod 4 of a, b, c, d."""
    data = module(shards, batch_size=3, classes=chosen)
    assert data.num_classes == len(chosen)
    assert data.classes == tuple("abcd"[number] for number in numbers)
    kept = [(number, number % 4) for number in range(26) if number % 4 in numbers]
    val, train = (
        [
            (number, numbers[label])
            for batch in loader
            for number, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
        ]
        for loader in (data.val_dataloader(), data.train_dataloader())
    )
    assert val == kept
    assert len(set(train)) == len(train) == len(kept) // 3 * 3
    assert set(train) <= set(kept)


def test_classes_of_shards_without_names(tmp_path):
    """Labels are all that is known; a sample without one could be of any class, and counts as bad."""
    bad = ("x", {"png": sample(1)[1]["png"], "cls": b"abc"})
    write_shard(tmp_path / "0.tar", [sample(0), bad, sample(1), sample(4)])
    options = {"num_classes": None, "batch_size": 1}
    data = module(tmp_path, classes=[1, 0], max_bad_share=0.3, **options)
    assert [int(batch["label"]) for batch in data.val_dataloader()] == [1, 0, 1]
    assert data.skipped["val"] == {"0.tar/x": "its label is 'abc', the classes are 0, 1, ..."}
    refused(r"data\.val: 1 of 4 samples cannot", lambda: module(tmp_path, classes=[1, 0], **options).val_dataloader())
    with pytest.raises(UserError, match=r"data\.classes: .* has no sample of \[2\]"):
        module(tmp_path, classes=[2], max_bad_share=1.0, **options).train_dataloader()


@pytest.mark.parametrize(
    ("classes", "line"),
    [("abdc", "its class 2 is d, in data.train that is c"), ("abc", "its class 3 is missing, in data.train that is d")],
)
def test_training_and_validation_must_have_the_same_classes(shards, tmp_path, classes, line):
    shutil.copytree(shards, tmp_path / "val")
    index = json.loads((shards / "index.json").read_text())
    (tmp_path / "val" / "index.json").write_text(json.dumps(index | {"classes": list(classes)}))
    refused(f"data.val: {line}", lambda: ImageNetDataModule(str(shards), str(tmp_path / "val")).setup("fit"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"num_workers": -1}, r"data\.num_workers is -1: must be at least 0"),
        ({"image_size": 0}, r"data\.image_size is 0: must be"),
        ({"num_classes": 0}, r"data\.num_classes is 0: must be"),
        ({"crop": "foo"}, r"data\.crop: 'foo' is none of adm, ten_crop, center"),
        ({"max_bad_share": 2}, r"data\.max_bad_share is 2: must be at least 0, at most 1"),
        ({"batch_size": 27}, r"data\.batch_size: 27 x 1 devices x 1 batches per step is more than the 26 training"),
        ({"classes": ["a", "e"]}, r"data\.classes: 'e' is no class, they are 0 to 3 \(a, b, c, d\)"),
        ({"classes": [4]}, r"data\.classes: 4 is no class, they are 0 to 3"),
        ({"classes": [-1]}, r"data\.classes: -1 is no class"),
        ({"classes": [True]}, r"data\.classes: True is no class"),
        ({"classes": []}, r"data\.classes: \[\] is empty"),
        ({"classes": ["a", 0]}, "names a class twice"),
    ],
    ids=str,
)
def test_options_that_cannot_be(shards, options, line):
    def fit() -> None:
        data = module(shards, **options)
        data.index("val")  # which is early enough for classes
        if "classes" not in options:
            data.train_dataloader()

    refused(line, fit)


def test_options_of_a_config():
    """Class names and numbers, as YAML has them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageNetDataModule, "data")
    assert parser.parse_args(["--data.classes=[3, Orange, 0]"]).data.classes == [3, "Orange", 0]


def state(data: ImageNetDataModule) -> dict:
    """Of a run that has begun."""
    data.train_dataloader()
    return data.state_dict()


def resume(data: ImageNetDataModule, checkpoint: dict) -> None:
    data.load_state_dict(checkpoint)
    data.train_dataloader()


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"seed": 4}, "data.seed was 3 in the checkpoint and is 4 now"),
        ({"crop": "ten_crop"}, "data.crop was adm in the checkpoint and is ten_crop now"),
        ({"flip": False}, "data.flip was True in the checkpoint and is False now"),
        ({"image_size": 8}, "data.image_size was 16 in the checkpoint and is 8 now"),
        ({"batch_size": 5}, "batch size x devices was 4 in the checkpoint and is 5 now; use the same, or start a new"),
        ({"classes": ["b", "a", "c", "d"]}, "hash of the training data"),
        ({"classes": ["b"]}, "number of training samples was 26 in the checkpoint and is 7 now"),
    ],
    ids=str,
)
def test_resuming_refuses_other_options(shards, option, line):
    refused(f"^cannot resume: {line}", lambda: resume(module(shards, **option), state(module(shards))))
    module(shards, **option).load_state_dict({"stream": None, "seed": option.get("seed", 3)})  # of an earlier version


def test_resuming_refuses_other_data(shards, tmp_path):
    """As many samples, one of them another; the same shards in another folder are the same data."""
    moved, other = (shutil.copytree(shards, tmp_path / name) for name in ("moved", "other"))
    write_set(other, bad={5})
    checkpoint = state(module(shards))
    resume(module(moved), checkpoint)
    refused("cannot resume: hash of the training data", lambda: resume(module(other), checkpoint))
