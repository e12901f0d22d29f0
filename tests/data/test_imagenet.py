"""ImageNetDataModule: which classes, which options, what a resumed run must share, and the shipped configs."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import instantiate_class
from tiny_shards import module, sample, write_set

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import write_shard
from dar_lightning.errors import UserError


def test_epochs_differ_and_have_no_repeats(shards):
    loader = module(shards, batch_size=2).train_dataloader()
    epochs = [
        {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}
        for _ in (0, 1)
    ]
    assert [len(epoch) for epoch in epochs] == [26, 26]
    assert [*epochs[0]] != [*epochs[1]]
    assert sum(torch.equal(epochs[0][key], epochs[1][key]) for key in epochs[0]) < 5  # other crops


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_are_chosen_and_renumbered(shards, workers):
    """Sample n is of class n mod 4 of a, b, c, d."""
    for chosen, numbers in ((["d", "b"], (3, 1)), ([2], (2,)), ([1, "a", 3], (1, 0, 3))):
        data = module(shards, num_workers=workers, batch_size=3, classes=chosen)
        assert data.num_classes == len(chosen)
        assert data.classes == tuple("abcd"[number] for number in numbers)
        kept = [(number, number % 4) for number in range(26) if number % 4 in numbers]
        found = {
            loader: [
                (number, numbers[label])
                for batch in getattr(data, f"{loader}_dataloader")()
                for number, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
            ]
            for loader in ("val", "train")
        }
        assert found["val"] == kept
        assert len(set(found["train"])) == len(found["train"]) == len(kept) // 3 * 3
        assert set(found["train"]) <= set(kept)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["a", "e"], r"data\.classes: 'e' is no class, they are 0 to 3 \(a, b, c, d\)"),
        ([4], r"data\.classes: 4 is no class, they are 0 to 3"),
        ([-1], r"data\.classes: -1 is no class"),
        ([True], r"data\.classes: True is no class"),
        ([], r"data\.classes: \[\] is empty"),
        (["a", "a"], "names a class twice"),
        (["a", 0], "names a class twice"),
    ],
    ids=str,
)
def test_classes_that_cannot_be_chosen(shards, chosen, message):
    with pytest.raises(UserError, match=message):
        module(shards, classes=chosen).index("val")


def test_classes_of_shards_without_names(tmp_path):
    """Labels are all that is known; a sample without one could be of any class, and counts as bad."""
    bad = ("x", {"png": sample(1)[1]["png"], "cls": b"abc"})
    write_shard(tmp_path / "0.tar", [sample(0), bad, sample(1), sample(4)])
    options = {"num_classes": None, "batch_size": 1}
    data = module(tmp_path, classes=[1, 0], max_bad_share=0.3, **options)
    assert [int(batch["label"]) for batch in data.val_dataloader()] == [1, 0, 1]
    assert data.skipped["val"] == {"0.tar/x": "its label is 'abc', the classes are 0, 1, ..."}
    with pytest.raises(UserError, match=r"data\.val: 1 of 4 samples cannot be used"):
        module(tmp_path, classes=[1, 0], **options).val_dataloader()
    with pytest.raises(UserError, match=r"data\.classes: .* has no sample of \[2\]"):
        module(tmp_path, classes=[2], max_bad_share=1.0, **options).train_dataloader()


def test_training_and_validation_must_have_the_same_classes(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "val")
    index = json.loads((shards / "index.json").read_text())
    for classes, line in (
        ("abdc", "its class 2 is d, in data.train that is c"),
        ("abc", "its class 3 is missing, in data.train that is d"),
    ):
        (tmp_path / "val" / "index.json").write_text(json.dumps(index | {"classes": list(classes)}))
        with pytest.raises(UserError, match=f"data.val: {line}"):
            ImageNetDataModule(str(shards), str(tmp_path / "val")).setup("fit")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"num_workers": -1}, "num_workers: -1 is negative"),
        ({"image_size": 0}, r"data\.image_size: 0 is not a number of pixels"),
        ({"num_classes": 0}, r"data\.num_classes: 0 is not a number of classes"),
        ({"crop": "foo"}, r"data\.crop: 'foo' is none of adm, ten_crop, center"),
        ({"max_bad_share": 2}, r"data\.max_bad_share: 2 is not a share"),
        ({"batch_size": 27}, r"batch_size: 27 on 1 device\(s\) is more than the 26 training samples"),
    ],
    ids=str,
)
def test_options_that_cannot_be(shards, option, line):
    with pytest.raises(UserError, match=line):
        module(shards, **option).train_dataloader()


def test_without_training_shards():
    with pytest.raises(UserError, match=r"data\.train: not set; give a folder of shards"):
        ImageNetDataModule().train_dataloader()


def test_the_shipped_configs_build_their_datamodules(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    files = sorted((root / "experiments" / "data").glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        config = parser.parse_object(yaml.safe_load(file.read_text()))
        data = instantiate_class((), config.as_dict()["data"])
        if file.stem == "fruit64":
            data.setup("fit")
            assert len(data.classes) == data.num_classes == 14
            assert next(iter(data.train_dataloader()))["image"].shape == (16, 3, 64, 64)


def test_options_of_a_config():
    """Class names and numbers, as YAML has them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageNetDataModule, "data")
    config = parser.parse_args(["--data.classes=[3, Orange, 0]", "--data.cache_dir=x", "--data.max_bad_share=0.5"])
    assert config.data.classes == [3, "Orange", 0]


# ---- what a resumed run must share


def state(data: ImageNetDataModule) -> dict:
    """Of a run that has begun."""
    data.train_dataloader()
    return data.state_dict()


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
    def resume() -> None:
        data = module(shards, **option)
        data.load_state_dict(state(module(shards)))
        data.train_dataloader()

    with pytest.raises(UserError, match=f"^cannot resume: {line}"):
        resume()
    module(shards, **option).load_state_dict({"stream": None, "seed": option.get("seed", 3)})  # of an earlier version


def test_resuming_refuses_other_data(shards, tmp_path):
    """As many samples, one of them another; the same shards in another folder are the same data."""
    moved, other = (shutil.copytree(shards, tmp_path / name) for name in ("moved", "other"))
    write_set(other, bad={5})
    before = state(module(shards))
    old_name = before | {"stream": before["stream"] | {"fingerprint": before["stream"]["data_sha256"]}}
    del old_name["stream"]["data_sha256"]
    for checkpoint in (before, old_name):
        same = module(moved)
        same.load_state_dict(checkpoint)
        same.train_dataloader()
        data = module(other)
        data.load_state_dict(checkpoint)
        with pytest.raises(UserError, match="cannot resume: hash of the training data"):
            data.train_dataloader()
