"""The ILSVRC2012 archives, built here in their layout: a tar of tars; a devkit with numbers of its own."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from dar_lightning.commands.shard import shard
from dar_lightning.errors import UserError

# ILSVRC2012_ID 1, 2, 3 -> WordNet ID: like the devkit's, not sorted
WNIDS = {1: "n02119789", 2: "n02100735", 3: "n01440764"}
INNER = {4: "n00001740"}  # a node of the hierarchy, no class
IDS = [3, 1, 1, 2, 3, 2]  # of validation images 1 to 6
LABELS = [0, 2, 2, 1, 0, 1]  # their positions in the sorted WordNet IDs, by hand


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def tar_of(contents: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, content in contents.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


def meta_mat() -> bytes:
    scipy_io = pytest.importorskip("scipy.io")
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in WNIDS.items()]
    rows += [(number, wnid, "entity", "gloss", 3) for number, wnid in INNER.items()]
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    synsets = np.array(rows, dtype=[(name, object) for name in names]).reshape(-1, 1)
    file = io.BytesIO()
    scipy_io.savemat(file, {"synsets": synsets})
    return file.getvalue()


def truth_txt() -> bytes:
    return "".join(f"{number}\n" for number in IDS).encode()


@pytest.fixture
def devkit() -> dict[str, bytes]:
    root = "ILSVRC2012_devkit_t12"
    return {
        f"{root}/readme.txt": b"read me",
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth_txt(),
        f"{root}/data/meta.mat": meta_mat(),
    }


@pytest.fixture
def val(tmp_path) -> Path:
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in range(1, 7)}
    path = tmp_path / "in" / "ILSVRC2012_img_val.tar"
    path.parent.mkdir()
    path.write_bytes(tar_of(dict(reversed(images.items()))))  # the number counts, not the order in the tar
    return path


def train_images() -> dict[str, dict[str, bytes]]:
    return {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(100 * number + i) for i in range(3 + number)}
        for number, wnid in enumerate(["n02119789", "n01440764", "n02100735"])
    }


def read(folder: Path) -> dict[str, tuple[bytes, int, str]]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    found = {s["__key__"]: (s["jpg"], int(s["cls"]), json.loads(s["json"])["class"]) for s in samples}
    assert len(found) == len(samples)
    return found


def test_training_archive(tmp_path):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    images = train_images()
    path.write_bytes(tar_of({f"{wnid}.tar": tar_of(inner) for wnid, inner in images.items()}))
    shard(str(path), str(tmp_path / "out"), max_per_shard=5, workers=1)
    labels = {"n01440764": 0, "n02100735": 1, "n02119789": 2}
    assert read(tmp_path / "out") == {
        name.removesuffix(".JPEG"): (content, labels[wnid], wnid)
        for wnid, inner in images.items()
        for name, content in inner.items()
    }
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == sorted(labels)


def test_unpacked_archive_gives_the_same_shards(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of({f"{wnid}.tar": tar_of(inner) for wnid, inner in train_images().items()}))
    for wnid, inner in train_images().items():
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for name, content in inner.items():
            (tmp_path / "train" / wnid / name).write_bytes(content)
    for source in ("train.tar", "train"):
        shard(str(tmp_path / source), str(tmp_path / "out" / source), workers=1)
    one, two = (json.loads((tmp_path / "out" / name / "index.json").read_text()) for name in ("train.tar", "train"))
    assert one == two


@pytest.mark.parametrize("at", [0.3, 0.6, 0.95])
def test_a_cut_training_archive(tmp_path, at):
    content = tar_of({f"{wnid}.tar": tar_of(inner) for wnid, inner in train_images().items()})
    path = tmp_path / "train.tar"
    end = int(len(content.rstrip(b"\0")) * at)
    for size in (end, end // 512 * 512):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"train\.tar is (cut short|not a readable)") as error:
            shard(str(path), str(tmp_path / "out"), workers=1)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


def test_an_archive_cut_between_classes(tmp_path):
    """tarfile itself would take this for the end."""
    content = tar_of({f"{wnid}.tar": tar_of(inner) for wnid, inner in train_images().items()})
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        third = tar.getmembers()[2].offset
    (tmp_path / "train.tar").write_bytes(content[:third])
    with pytest.raises(UserError, match=f"cut short at byte {third}"):
        shard(str(tmp_path / "train.tar"), str(tmp_path / "out"), workers=1)


@pytest.mark.parametrize("kind", ["beside", "archive", "folder", "text with meta.mat", "WordNet IDs"])
def test_validation_archive(val, devkit, tmp_path, kind):
    labels = tmp_path / "labels"
    if kind in ("beside", "archive"):
        name = "in/ILSVRC2012_devkit_t12.tar.gz" if kind == "beside" else "kit.tar.gz"
        labels = tmp_path / name
        labels.write_bytes(tar_of(devkit, "w:gz"))
    elif kind == "WordNet IDs":
        labels.write_text("".join(f"{WNIDS[number]}\n" for number in IDS))
    else:
        for name, content in devkit.items():
            (labels / name).parent.mkdir(parents=True, exist_ok=True)
            (labels / name).write_bytes(content)
        if kind != "folder":
            (labels,) = labels.rglob("*ground_truth.txt")
    shard(str(val), str(tmp_path / "out"), labels=None if kind == "beside" else str(labels), workers=1)
    classes = sorted(WNIDS.values())
    assert read(tmp_path / "out") == {
        f"ILSVRC2012_val_{i:08d}": (jpeg(i), label, classes[label]) for i, label in enumerate(LABELS, 1)
    }
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; the validation images need ILSVRC2012_devkit_t12.tar.gz"),
        (b"1\n2\n3\n", "has no WordNet IDs, and meta.mat"),
        (b"n01440764\n" * 5, "has 5 labels, .*val.tar holds 6 images"),
    ],
)
def test_labels_that_cannot_be(val, tmp_path, content, message):
    if content is not None:
        (tmp_path / "truth.txt").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        shard(str(val), str(tmp_path / "out"), labels=str(tmp_path / "truth.txt"), workers=1)
    assert str(error.value).startswith("labels: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ILSVRC2012_validation_ground_truth.txt": b"4\n" * 6}, "has label '4', meta.mat knows 1 to 3"),
        ({"ILSVRC2012_validation_ground_truth.txt": None}, "has no ILSVRC2012_validation_ground_truth.txt"),
        ({"meta.mat": b"matrix"}, "meta.mat of .* is not the devkit's"),
    ],
)
def test_devkits_that_cannot_be(val, devkit, tmp_path, change, message):
    for name, content in change.items():
        path = f"ILSVRC2012_devkit_t12/data/{name}"
        devkit.pop(path)
        if content is not None:
            devkit[path] = content
    (tmp_path / "kit.tar.gz").write_bytes(tar_of(devkit, "w:gz"))
    with pytest.raises(UserError, match=message):
        shard(str(val), str(tmp_path / "out"), labels=str(tmp_path / "kit.tar.gz"), workers=1)


def test_a_broken_devkit(val, devkit, tmp_path):
    (tmp_path / "kit.tar.gz").write_bytes(tar_of(devkit, "w:gz")[:-200])
    with pytest.raises(UserError, match="is not the devkit's archive"):
        shard(str(val), str(tmp_path / "out"), labels=str(tmp_path / "kit.tar.gz"), workers=1)
