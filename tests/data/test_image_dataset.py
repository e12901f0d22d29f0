"""From the shard to the batch: the right pixels of the right sample, or its name and the reason why it is bad."""

import io
import pickle
import tarfile
from collections import Counter
from functools import cache
from itertools import count, islice, pairwise
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from encoded import encode, picture, png
from PIL import Image
from recorder import Recorder
from tiny_shards import CLASSES, module, sample, validated, write_set, write_tar
from tiny_shards import picture as noise
from torch import Tensor
from torchvision.transforms import TenCrop
from torchvision.transforms.functional import pil_to_tensor

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.sampler import EvalSampler, TrainSampler
from dar_lightning.data.shards import Shard, ShardIndex, write_shard
from dar_lightning.training.callbacks import Throughput

# ---- samples that cannot be used


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
        "far": ({"png": image, "cls": b"1000"}, "its label is '1000', the classes are 0 to 3"),
        "word": ({"png": image, "cls": b"abc"}, "its label is 'abc', the classes are 0 to 3"),
        "digits": ({"png": image, "cls": b"1" * 9999}, f"its label is '{'1' * 20}', the classes are 0 to 3"),
        "unlabelled": ({"png": image}, unlabelled),
        "text": ({"png": b"not a picture", "cls": b"0"}, "not an image of a known format"),
        "pickled": ({"pkl": trap, "cls": b"0"}, "no image (jpg, jpeg, png, webp)"),
        "../x": ({"png": image, "cls": b"0"}, outside),
        absolute: ({"png": image, "cls": b"0"}, outside),
        "line\nbreak": ({"png": image}, unlabelled),
    }
    good = [("good-1.png", image), ("good-1.cls", b"3\n"), ("good-1.pyd", trap), ("good-1.pkl", trap)]
    members = [(f"{key}.{name}", content) for key, (parts, _) in bad.items() for name, content in parts.items()]
    again = [("good-1.png", sample(1)[1]["png"]), ("good-1.cls", b"2"), ("good-2.JPG", image), ("good-2.cls", b"1")]
    write_tar(tmp_path / "0.tar", [*good, *members, *again, ("../none", b"x"), (link, b""), ("linked.cls", b"0")])
    before = sorted(tmp_path.rglob("*"))
    data = module(tmp_path, max_bad_share=0.9, num_workers=1)
    assert validated(data) == ["0.tar/good-1", "0.tar/good-2"]
    reasons = {key: reason for key, (_, reason) in bad.items()} | {
        "good-1": "its key is in the shard twice",
        "../none": outside,
        "linked": "it is a link, a device or a sparse file, not a plain one",
    }
    reasons[r"'line\nbreak'"] = reasons.pop("line\nbreak")
    assert data.skipped["val"] == {f"0.tar/{key}": reason for key, reason in reasons.items()}
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
    assert batch["key"][:3] == ["photo-000", "photo-001", "photo-002"]
    assert batch["label"][:3].tolist() == [0, 1, 2]
    assert batch["valid"].tolist() == [True, True, True, False][:counted]
    assert data.skipped["val"] == ({"0.tar/photo-000": "its key is in the shard twice"} if counted == 4 else {})


# ---- what takes their places


@pytest.fixture
def damaged(tmp_path):
    """26 samples, of which 3 are bad: one has no image, two are cut off. And the names of the good ones."""
    names = write_set(tmp_path, bad={3})
    with tarfile.open(tmp_path / "000002.tar") as tar:
        cut = tar.getmember("photo-024.png").offset + 700
    (tmp_path / "000002.tar").write_bytes((tmp_path / "000002.tar").read_bytes()[:cut])
    return tmp_path, [name for name in names if name[-3:] not in ("003", "024", "025")]


def test_training_puts_good_samples_in_the_places_of_bad_ones(damaged):
    folder, names = damaged

    def taken(start: int = 0, **options) -> tuple[list[tuple], dict[str, str]]:
        data = module(folder, batch_size=2, max_bad_share=0.9, **options)
        loader = data.train_dataloader()
        loader.sampler.position = start
        batches = [batch for _ in range(2) for batch in loader]
        seen = [(b["key"], b["index"].tolist(), b["label"].tolist(), b["image"].numpy().tobytes()) for b in batches]
        return seen, data.skipped["train"]

    one, skipped = taken()
    assert len(one) == 26  # 13 batches an epoch
    for keys, numbers, labels, images in one:
        assert len(images) == 2 * 3 * 16 * 16
        assert keys == [f"photo-{number:03d}" for number in numbers]  # named for what it shows
        assert labels == [number % 4 for number in numbers]
    for epoch in (one[:13], one[13:]):
        assert {key for keys, *_ in epoch for key in keys} == {name.partition("/")[2] for name in names}
    assert list(skipped) == ["000002.tar/photo-024", "000002.tar/#6", "000000.tar/photo-003"]
    assert taken(num_workers=2) == (one, skipped)
    assert taken(5)[0][:21] == one[5:]
    assert taken(seed=1)[0] != one


@pytest.mark.parametrize("world", [2, 7])
def test_ranks_stay_equal(damaged, world):
    folder, names = damaged
    data = module(folder, max_bad_share=0.9)
    dataset = data.val_dataloader().dataset
    ranks = [[dataset[ticket] for ticket in EvalSampler(dataset, world, rank)] for rank in range(world)]
    assert len({len(items) for items in ranks}) == 1
    assert sorted(f"{item['shard']}/{item['key']}" for items in ranks for item in items if item["valid"]) == names
    dataset, order = (loader := data.train_dataloader()).dataset, loader.sampler.order
    whole, *parts = [
        [dataset[ticket]["key"] for ticket in TrainSampler(dataset, order, 14 // count, count, rank)]
        for count in (1, world)
        for rank in range(count)
    ]
    assert [key for part in parts for key in part] == whole


# ---- odd files

SIZE = 16
# The middle of these is cut out and not scaled; turned by an orientation tag, it would be another.
WIDE, TALL = picture(24, SIZE), picture(SIZE, 24)


def middle(image: Image.Image) -> np.ndarray:
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.array(image.convert("RGB"))[top : top + SIZE, left : left + SIZE]


def strip(width: int, height: int) -> Image.Image:
    """Red, but green where its middle is."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 255, 0), (max(0, width // 2 - 20), max(0, height // 2 - 20), width // 2 + 20, height // 2 + 20))
    return image


@cache
def odd_but_good() -> dict[str, tuple[str, bytes, np.ndarray]]:
    """Key -> extension, file, and the pixels (16, 16, 3) of its centre crop. What Pillow may give is test_decode's."""
    turned = Image.Exif()
    turned[0x0112] = 6
    green = np.broadcast_to(np.uint8((0, 255, 0)), (SIZE, SIZE, 3))
    high = {"quality": 95, "subsampling": 0}
    return {
        "png-named-jpg": ("jpg", encode(TALL, "PNG"), middle(TALL)),
        "jpeg-named-png": ("png", encode(TALL, "JPEG", **high), middle(TALL)),
        "exif-6": ("jpeg", encode(WIDE, "JPEG", exif=turned, **high), middle(WIDE)),
        "high-strip": ("png", encode(strip(1, 10_000), "PNG"), green),
        "long-strip": ("png", encode(strip(10_000, 1), "PNG"), green),
        "webp": ("webp", encode(WIDE, "WEBP", lossless=True), middle(WIDE)),
    }


ODD_AND_BAD = {  # key -> extension, file, and what its reason begins with
    "bomb": ("png", png(30_000, 30_000, 8, 2, b""), "more than 178956970 pixels"),
    "cut": ("jpg", encode(WIDE, "JPEG")[:-20], "damaged (image file is truncated"),
    "nothing": ("webp", b"", "not an image of a known format"),
}


@pytest.fixture
def odd(tmp_path) -> Path:
    """Two shards with good and bad ones."""
    files = odd_but_good() | ODD_AND_BAD
    for i in (0, 1):
        samples = [(key, {files[key][0]: files[key][1], "cls": b"0"}) for key in list(files)[i::2]]
        write_shard(tmp_path / f"{i}.tar", samples)
    return tmp_path


def check_pixels(key: str, image: Tensor) -> None:
    _, content, expected = odd_but_good()[key]
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
    lossy = Image.open(io.BytesIO(content)).format == "JPEG"
    assert difference.mean() < 3 if lossy else difference.max() == 0, key


class Watching(Recorder):
    def training_step(self, batch, batch_idx):
        for key, image in zip(batch["key"], batch["image"], strict=True):
            check_pixels(key, image)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore")  # Lightning's, of workers and loggers
def test_odd_files_in_training_and_its_metric(odd, caplog):
    data, model = module(odd, num_workers=2, crop="center", flip=False, batch_size=3, max_bad_share=0.9), Watching()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "log_every_n_steps": 1}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, callbacks=[Throughput(flops=False)], **quiet
    )
    trainer.fit(model, datamodule=data)
    keys = [key for keys, _ in model.seen for key in keys]
    assert len(keys) == 9
    assert set(keys) == set(odd_but_good())  # some of them twice, in the places of the bad ones
    assert trainer.callback_metrics["data/skipped"] == len(ODD_AND_BAD)
    reasons = {name.partition("/")[2]: reason for name, reason in data.skipped["train"].items()}
    assert reasons.keys() == ODD_AND_BAD.keys()
    assert all(reasons[key].startswith(start) for key, (_, _, start) in ODD_AND_BAD.items())
    lines = [line for line in caplog.messages if "skipped" in line]
    assert sorted(lines) == sorted(f"data.train: skipped {bad[0]}: {bad[1]}" for bad in data.skipped["train"].items())


# ---- ten crops, of which a sample's is a function of seed and epoch

CROP = 20  # of a square of 22 pixels: its corners and its middle are five different crops


@cache
def ten(number: int) -> list[Tensor]:
    """All crops of a picture, by Pillow and torchvision: 40x48 pixels at 1.1 CROP, of that the middle square."""
    square = noise(number).resize((22, 26), Image.Resampling.BICUBIC).crop((0, 2, 22, 24))
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
        assert sum(one[number] == other[number] for number in range(26)) < 9, "a sample's crop changes"
    for same in ({"flip": False}, {"num_workers": 2}, {"batch_size": 13}):
        assert taken(module(shards, **options | same), 2 * 26) == found[: 2 * 26]
