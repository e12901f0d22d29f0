"""ImageNetDataModule: which images and classes, which options, and what a resumed run must share."""

import json
import pickle
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from recorder import fit
from refusals import refused
from tiny_models import make_tokenizer, write_images, write_tokens
from tiny_shards import CLASSES, module, picture, sample, validated, write_set, write_tar
from torch import Tensor
from torchvision.transforms import TenCrop
from torchvision.transforms.functional import pil_to_tensor

from dar_lightning.commands.extract import extract
from dar_lightning.data.classes import labels_by_name
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import Shard, ShardIndex, write_shard
from dar_lightning.errors import UserError
from dar_lightning.training.callbacks import Throughput


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
    refused(
        r"data\.val: 1 of 4 samples cannot be used",
        lambda: module(tmp_path, classes=[1, 0], **options).val_dataloader(),
    )
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


TRAIN = ("cat", "dog", "fox")


@pytest.mark.parametrize(
    ("val", "says"),
    [
        (("cat", "fox"), "data.val: its class 1 is fox, in data.train that is dog"),
        (("dog", "cat", "fox"), "data.val: its class 0 is dog, in data.train that is cat"),
        (("cat", "dog"), "data.val: its class 2 is missing, in data.train that is fox"),
        (("cat", "dog", "fox", "gnu"), "data.val: its class 3 is gnu, in data.train that is missing"),
        (TRAIN, None),
        ((), None),  # nobody knows them
    ],
)
def test_tokens_for_training_and_validation(val, says, tmp_path):
    folders = [write_tokens(tmp_path / "train", 6, TRAIN), write_tokens(tmp_path / "val", 6, val or ("one",))]
    if not val:
        index = tmp_path / "val" / "index.json"
        index.write_text(index.read_text().replace('"one"', ""))
    data = CodesDataModule(*folders, batch_size=2)
    if says is None:
        data.setup("fit")
        return
    refused(f"^{says}; ", data.setup, "fit")
    CodesDataModule(val=folders[1]).setup("validate")  # alone, they are as good as any


def test_a_checkpoint_is_of_its_classes(tmp_path):
    """Also where it is only scored: there is no training data then to compare with."""
    trained = CodesDataModule(write_tokens(tmp_path / "train", 6, TRAIN), batch_size=2)
    trained.setup("fit")
    trained.train_dataloader()
    state = trained.state_dict()
    for classes, says in ((("dog", "cat", "fox"), "its class 0 is dog"), (("cat", "dog"), "its class 2 is missing")):
        other = CodesDataModule(val=write_tokens(tmp_path / classes[0], 6, classes), batch_size=2)
        refused(f"^data.val: {says}, in the checkpoint that is", other.load_state_dict, state)
    same = CodesDataModule(val=write_tokens(tmp_path / "same", 6, TRAIN), batch_size=2)
    same.load_state_dict(state)
    del state["classes"]  # of a version that did not keep them
    other.load_state_dict(state)


def test_images_whose_classes_were_renamed_since_they_became_tokens(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    images = write_images(tmp_path / "images", 8)
    words = (str(tmp_path / "tokenizer"), images, str(tmp_path / "tokens"))
    options = {"crops": "center", "accelerator": "cpu", "devices": 1}
    extract(*words, **options)
    extract(*words, **options)  # complete
    replace(ShardIndex.load(images), classes=("red", "blue", "green", "grey")).save()
    refused(r"^output: its class 1 is green, in shards that is blue; choose another", extract, *words, **options)


def test_labels_are_matched_by_name():
    labels = torch.tensor([0, 1, 1, 2])
    options = {"option": "--samples", "other": "--probe_train"}
    assert labels_by_name(labels, TRAIN, ("fox", "cow", "dog", "cat"), **options).tolist() == [3, 2, 2, 0]
    for names in ((TRAIN, ()), ((), TRAIN)):
        assert labels_by_name(labels, *names, **options) is labels
    assert labels_by_name(labels[:3], TRAIN, ("dog", "cat"), **options).tolist() == [1, 0, 0], "fox does not occur"
    with pytest.raises(UserError, match=r"^--samples: its class fox is none of --probe_train, which has dog, cat; "):
        labels_by_name(labels, TRAIN, ("dog", "cat"), **options)
    refused(
        r"^--samples: has labels outside its 2 classes", labels_by_name, labels, TRAIN[:2], ("dog", "cat"), **options
    )


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_all_kinds_of_bad_samples(tmp_path):
    """One shard that has them among good ones."""
    image, trap = sample(0)[1]["png"], pickle.dumps(Trap(tmp_path / "trapped"))
    link = tarfile.TarInfo("linked.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    absolute = f"{tmp_path}/absolute"
    outside, unlabelled = "its name leads out of the shard", "no .cls member, which must hold its class number"
    bad = {  # name -> its members, and the reason
        "minus": ({"png": image, "cls": b"-1"}, "its label is '-1', the classes are 0 to 3"),
        "four": ({"png": image, "cls": b"4"}, "its label is '4', the classes are 0 to 3"),
        "word": ({"png": image, "cls": b"abc"}, "its label is 'abc', the classes are 0 to 3"),
        "digits": ({"png": image, "cls": b"1" * 9999}, f"its label is '{'1' * 20}', the classes are 0 to 3"),
        "unlabelled": ({"png": image}, unlabelled),
        "text": ({"png": b"not a picture", "cls": b"0"}, "not an image of a known format"),
        "a:b: c/d": ({"png": b"", "cls": b"0"}, "not an image of a known format"),
        "pickled": ({"pkl": trap, "cls": b"0"}, "no image (jpg, jpeg, png, webp)"),
        "../x": ({"png": image, "cls": b"0"}, outside),
        absolute: ({"png": image, "cls": b"0"}, outside),
        "line\nbreak": ({"png": image}, unlabelled),
    }
    good = [("good-1.png", image), ("good-1.cls", b"3\n"), ("good-1.pyd", trap), ("good-1.pkl", trap)]
    members = [(f"{key}.{name}", content) for key, (parts, _) in bad.items() for name, content in parts.items()]
    again = [("good-1.png", sample(1)[1]["png"]), ("good-1.cls", b"2"), ("good-2.JPG", image), ("good-2.cls", b"1")]
    again += [("good-3.webp", image), ("good-3.cls", b"0")]  # whose name lies
    write_tar(tmp_path / "0.tar", [*good, *members, *again, ("../none", b"x"), (link, b""), ("linked.cls", b"0")])
    before = sorted(tmp_path.rglob("*"))
    data = module(tmp_path, max_bad_share=0.9, num_workers=1)
    assert validated(data) == ["0.tar/good-1", "0.tar/good-2", "0.tar/good-3"]
    reasons = {key: reason for key, (_, reason) in bad.items()} | {
        "good-1": "its key is in the shard twice",
        "../none": outside,
        "linked": "it is a link, a device or a sparse file, not a plain one",
    }
    reasons[r"'line\nbreak'"] = reasons.pop("line\nbreak")
    assert data.skipped["val"] == {f"0.tar/{key}": reason for key, reason in reasons.items()}
    data = module(tmp_path, max_bad_share=0.9, batch_size=len(reasons) + 3)
    data.val, throughput = None, Throughput(flops=False)
    model = fit(data, callbacks=[throughput], max_epochs=1, log_every_n_steps=1, enable_checkpointing=False)
    seen = {(key, label) for batch in model.seen for key, label, _ in batch}
    assert seen == {("good-1", 3), ("good-2", 1), ("good-3", 0)}
    assert model.trainer.callback_metrics["data/skipped"] == len(reasons)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted or unpickled
    assert not (tmp_path.parent / "x.png").exists()


@pytest.mark.parametrize("counted", [3, 4])
def test_the_first_of_two_samples_with_one_key(tmp_path, counted):
    """Whether the index counts keys or samples, the others keep their numbers."""
    samples = [sample(number) for number in (0, 1, 0, 2)]
    members = [(f"{key}.{ending}", content) for key, parts in samples for ending, content in parts.items()]
    members[5] = (members[5][0], b"3")
    write_tar(tmp_path / "0.tar", members)
    ShardIndex(tmp_path, (Shard("0.tar", counted, (tmp_path / "0.tar").stat().st_size),), CLASSES).save()
    data = module(tmp_path, max_bad_share=0.9)
    (batch,) = data.val_dataloader()
    assert batch["key"] == ["photo-000", "photo-001", "photo-002", "photo-000"][:counted]
    assert batch["shard"] == ["0.tar"] * counted
    assert batch["label"][:3].tolist() == [0, 1, 2]
    assert batch["valid"].tolist() == [True, True, True, False][:counted]
    assert data.skipped["val"] == ({"0.tar/photo-000": "its key is in the shard twice"} if counted == 4 else {})


CROP = 20  # of a square of 22 pixels: its corners and its middle are five different crops


@cache
def ten(number: int) -> list[Tensor]:
    """All crops of a picture, by Pillow and torchvision: 40x48 pixels at 1.1 CROP, of that the middle square."""
    square = picture(number).resize((22, 26), Image.Resampling.BICUBIC).crop((0, 2, 22, 24))
    return [pil_to_tensor(crop) for crop in TenCrop(CROP)(square)]


def taken(data: ImageNetDataModule, samples: int) -> list[tuple[int, int]]:
    """The first samples of training, or the next ones: the picture's number, and which of its crops is shown."""
    loader = data.train_dataloader()
    found = []
    for batch in islice((batch for _ in count() for batch in loader), samples // data.batch_size):
        for number, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            (crop,) = (crop for crop, expected in enumerate(ten(number)) if torch.equal(image, expected))
            found.append((number, crop))
    return found


def test_every_sample_is_one_of_its_ten_crops(shards):
    """`flip` has no say: half of the ten are mirrored."""
    options = {"image_size": CROP, "batch_size": 2, "crop": "ten_crop"}
    found = taken(module(shards, **options), 4 * 26)
    epochs = [dict(found[start : start + 26]) for start in range(0, len(found), 26)]
    assert all(sorted(epoch) == [*range(26)] for epoch in epochs)
    assert all(3 <= times <= 20 for times in Counter(crop for _, crop in found).values())
    assert {crop for _, crop in found} == {*range(10)}
    for one, other in [*pairwise(epochs), (epochs[0], dict(taken(module(shards, **options, **{"seed": 4}), 26)))]:
        assert [*one] != [*other]
        assert sum(one[number] == other[number] for number in range(26)) < 9, "a sample's crop changes"
    for same in ({"flip": False}, {"num_workers": 2}, {"batch_size": 13}):
        assert taken(module(shards, **options | same), 2 * 26) == found[: 2 * 26]
