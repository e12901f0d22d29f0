"""The ILSVRC2012 archives, built here in their layout: a tar of tars; a devkit with numbers of its own."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from refusals import refused

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


@pytest.fixture(scope="module")
def train_tar() -> bytes:
    return tar_of({f"{wnid}.tar": tar_of(inner) for wnid, inner in train_images().items()})


def test_training_archive_and_what_was_unpacked_of_it(train_tar, tmp_path):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(train_tar)
    shard(str(path), str(tmp_path / "out"), max_per_shard=5, workers=1)
    labels = {"n01440764": 0, "n02100735": 1, "n02119789": 2}
    images = train_images()
    assert read(tmp_path / "out") == {
        name.removesuffix(".JPEG"): (content, labels[wnid], wnid)
        for wnid, inner in images.items()
        for name, content in inner.items()
    }
    for wnid, inner in images.items():
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for name, content in inner.items():
            (tmp_path / "train" / wnid / name).write_bytes(content)
    shard(str(tmp_path / "train"), str(tmp_path / "again"), max_per_shard=5, workers=1)
    one, other = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("out", "again"))
    assert one == other
    assert one["classes"] == sorted(labels)


def test_a_cut_training_archive(train_tar, tmp_path):
    """At a block's end or not; tarfile itself would take a cut between two classes for the end."""
    with tarfile.open(fileobj=io.BytesIO(train_tar)) as tar:
        third = tar.getmembers()[2].offset
    end = len(train_tar.rstrip(b"\0"))
    path = tmp_path / "train.tar"
    for size in (*(int(end * at) for at in (0.3, 0.6, 0.95)), end // 2 // 512 * 512, third):
        path.write_bytes(train_tar[:size])
        message = f"cut short at byte {third}" if size == third else r"train\.tar is (cut short|not a readable)"
        refused(message, shard, str(path), str(tmp_path / "out"), workers=1)
        assert not (tmp_path / "out").exists()


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


TRUTH = "ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({TRUTH: b"4\n" * 6}, "has label '4', meta.mat knows 1 to 3"),
        ({TRUTH: None}, f"has no {TRUTH}"),
        ({"meta.mat": b"matrix"}, "meta.mat of .* is not the devkit's"),
        (200, "is not the devkit's archive"),
        (b"1\n2\n3\n", "has no WordNet IDs, and meta.mat"),
        (b"n01440764\n" * 5, "has 5 labels, .*val.tar holds 6 images"),
        (None, "does not exist; the validation images need ILSVRC2012_devkit_t12.tar.gz"),
    ],
)
def test_labels_that_cannot_be(val, devkit, tmp_path, changes, message):
    """Changed files of the devkit, an archive that is cut, a text file, nothing."""
    labels = tmp_path / ("truth.txt" if isinstance(changes, bytes) else "kit.tar.gz")
    if isinstance(changes, dict):
        files = devkit | {f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in changes.items()}
        labels.write_bytes(tar_of({name: content for name, content in files.items() if content is not None}, "w:gz"))
    elif changes is not None:
        labels.write_bytes(changes if isinstance(changes, bytes) else tar_of(devkit, "w:gz")[:-changes])
    with pytest.raises(UserError, match=message) as error:
        shard(str(val), str(tmp_path / "out"), labels=str(labels), workers=1)
    assert str(error.value).startswith("labels: ")
    assert "\n" not in str(error.value)
