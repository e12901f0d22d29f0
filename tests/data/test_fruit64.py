"""The embedded photos as they lie in the repository, and the script that makes them."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_shards import picture

from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex
from dar_lightning.files import file_sha256

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_fruit64", DATA / "build_fruit64.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits():
    """split -> list of (key, members)."""
    readers = {split: ShardReader(ShardIndex.load(DATA / "fruit64" / split)) for split in ("train", "val")}
    return {split: [reader[i][1:] for i in range(len(reader))] for split, reader in readers.items()}


def pixels(samples) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(members["jpg"]))) for _, members in samples])


def test_files_are_those_of_the_index():
    for split, total in (("train", 1186), ("val", 207)):
        index = ShardIndex.load(DATA / "fruit64" / split)
        assert index.num_samples == total
        for shard in index.shards:
            assert file_sha256(index.root / shard.name) == shard.sha256


def test_labels_names_and_sizes(splits):
    classes = ShardIndex.load(DATA / "fruit64" / "train").classes
    assert len(classes) == 14
    assert classes == ShardIndex.load(DATA / "fruit64" / "val").classes
    for samples in splits.values():
        for key, members in samples:
            about = json.loads(members["json"])
            assert classes[int(members["cls"])] == about["fine"]
            assert key == f"{about['fine'].lower()}-{about['source_row']:04d}"
            assert about["coarse"] in ("Apple", "Melon", "Pear", "Satsumas", "Orange")
        assert pixels(samples).shape == (len(samples), 64, 64, 3)


def test_split_is_stratified(splits):
    counts = {
        split: np.bincount([int(m["cls"]) for _, m in samples], minlength=14) for split, samples in splits.items()
    }
    share = counts["val"] / (counts["train"] + counts["val"])
    assert share.min() > 0.13
    assert share.max() < 0.17


def test_near_duplicates_do_not_straddle(splits):
    """By another measure than the one that made the clusters: plain distance of small pictures."""
    small = {
        split: np.stack(
            [np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BOX)) for image in pixels(s)]
        )
        for split, s in splits.items()
    }
    train, val = (small[split].reshape(len(small[split]), -1).astype(float) for split in ("train", "val"))

    def nearest(a, b):
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.sqrt(np.maximum(squares, 0) / a.shape[1])

    within = nearest(train, train) + 1e9 * np.eye(len(train))
    close = 15.0  # RMS of pixel values; photos of one burst come closer than this
    assert (within.min(1) < close).sum() > 20  # there are such pairs on one side
    assert nearest(val, train).min() > close


@pytest.fixture
def parquet(tmp_path):
    """Forty pictures, of which ten are there twice and ten are a shifted copy of another."""
    rows = []

    def add(name, image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        rows.append(
            {"finegrained_cat": name, "coarse_cat": "Fruit", "dataset": "train", "image_data": buffer.getvalue()}
        )

    for number in range(40):
        image = picture(number).resize((90, 110))
        add("ab"[number % 2], image.crop((0, 0, 80, 100)))
        if number < 10:
            rows.append(rows[-1])
        elif number < 20:
            add("ab"[number % 2], image.crop((6, 4, 86, 104)))
    path = tmp_path / "photos.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def test_rebuilding_gives_the_same_bytes(script, parquet, tmp_path, monkeypatch, capsys):
    script.build(parquet, tmp_path / "a")
    assert "60 rows, 50 distinct photos, 2 classes" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", "--parquet", str(parquet), "--output", str(tmp_path / "a"), "--check"])
    script.main()
    shard = tmp_path / "a" / "val" / "000000.tar"
    index = json.loads((shard.parent / "index.json").read_text())
    index["shards"][0]["sha256"] = "0" * 64
    (shard.parent / "index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="differs from the rebuilt split"):
        script.main()


def test_shifted_copies_stay_on_one_side(script, parquet, tmp_path):
    script.build(parquet, tmp_path)
    photos = pd.read_parquet(parquet)
    side = {}
    for split in ("train", "val"):
        reader = ShardReader(ShardIndex.load(tmp_path / split))
        side |= {json.loads(reader[i][2]["json"])["source_row"]: split for i in range(len(reader))}
    pairs = [(row, row + 1) for row in range(20, 40, 2)]
    assert all(photos.finegrained_cat[a] == photos.finegrained_cat[b] for a, b in pairs)
    assert all(side[a] == side[b] for a, b in pairs)
    assert set(side.values()) == {"train", "val"}
