"""Data sets in Hugging Face's format, on local data alone."""

import io
import json
import sys

import numpy as np
import pytest
import webdataset
from PIL import Image
from refusals import refused

from dar_lightning.commands.shard import shard


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"pip install 'dar-lightning\[datasets\]'", shard, "hf://some/name", str(tmp_path / "out"), workers=1)


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    return datasets


def make(datasets, numbers, labels=None, **extra):
    rows = {"note": [str(n) for n in numbers], "target": labels or [n % 3 for n in numbers], **extra}
    rows["picture"] = [{"bytes": png(n), "path": None} for n in numbers]
    features = {"note": datasets.Value("string"), "target": datasets.ClassLabel(names=["x", "y", "z"])}
    features |= {name: datasets.ClassLabel(names=["x"]) for name in extra}
    return datasets.Dataset.from_dict(rows, datasets.Features(features | {"picture": datasets.Image()}))


def read(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    return {s["__key__"]: (s["png"], int(s["cls"]), json.loads(s["json"])["class"]) for s in samples}


@pytest.mark.parametrize("workers", [1, 2])
def test_saved_to_disk(datasets, tmp_path, workers):
    make(datasets, range(7)).save_to_disk(tmp_path / "in")
    shard(str(tmp_path / "in"), str(tmp_path / "out"), max_per_shard=3, workers=workers)
    assert read(tmp_path / "out") == {f"{'xyz'[n % 3]}-{n:08d}": (png(n), n % 3, "xyz"[n % 3]) for n in range(7)}


def test_splits(datasets, tmp_path):
    parts = {"train": make(datasets, range(4)), "test": make(datasets, range(4, 6))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "in")
    for split in (None, "val"):
        refused(r"split: .*train, test", shard, str(tmp_path / "in"), str(tmp_path / "out"), split=split, workers=1)
    shard(str(tmp_path / "in"), str(tmp_path / "out"), split="test", workers=1)
    assert {content for content, _, _ in read(tmp_path / "out").values()} == {png(4), png(5)}


def test_a_local_folder_by_load_dataset(datasets, tmp_path):
    (tmp_path / "in").mkdir()
    make(datasets, range(5)).to_parquet(tmp_path / "in" / "data.parquet")
    shard(f"hf://{tmp_path / 'in'}", str(tmp_path / "out"), workers=1)
    assert len(read(tmp_path / "out")) == 5


def test_missing_labels_are_skipped(datasets, tmp_path):
    table = make(datasets, range(6), labels=[0, -1, 2, None, 1, 0])
    table.save_to_disk(tmp_path / "in")
    shard(str(tmp_path / "in"), str(tmp_path / "out"), max_bad_share=0.5, workers=1)
    reasons = [each["reason"] for each in json.loads((tmp_path / "out" / "skipped.json").read_text())]
    assert sorted(reasons) == ["label -1", "label None"]


def test_data_sets_that_cannot_be(datasets, tmp_path):
    make(datasets, range(3), other=[0, 0, 0]).save_to_disk(tmp_path / "two")
    make(datasets, range(3)).save_to_disk(tmp_path / "one")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "data.parquet").write_bytes(b"PAR1 and no more")
    for name, split, message in (
        (str(tmp_path / "two"), None, "2 columns of type ClassLabel among note, target, other, picture"),
        (str(tmp_path / "one"), "train", r"split: .*one holds one table and no splits; leave it out"),
        (f"hf://{tmp_path / 'damaged'}", None, r"input: .* cannot be loaded: "),
        (f"hf://{tmp_path / 'none'}", None, r"input: .* cannot be loaded: "),
    ):
        refused(message, shard, name, str(tmp_path / "out"), split=split, workers=1)
