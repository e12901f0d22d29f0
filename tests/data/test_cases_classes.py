"""Classes go by their names wherever two data sets meet: training and validation, checkpoints, images and tokens."""

from dataclasses import replace

import pytest
import torch
from refusals import refused
from tiny_models import make_tokenizer, write_images, write_tokens

from dar_lightning.commands.extract import extract
from dar_lightning.data.classes import labels_by_name
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import UserError

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
    refused(r"^--samples: has labels outside its 2", labels_by_name, labels, TRAIN[:2], ("dog", "cat"), **options)
