"""From the shard to the batch: the right pixels of the right sample, or its name and the reason why it is bad."""

import pickle
import tarfile
from collections import Counter
from functools import cache
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from recorder import fit
from tiny_shards import CLASSES, module, picture, sample, validated, write_tar
from torch import Tensor
from torchvision.transforms import TenCrop
from torchvision.transforms.functional import pil_to_tensor

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import Shard, ShardIndex
from dar_lightning.training.callbacks import Throughput


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
