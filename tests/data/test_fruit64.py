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
SPLITS = ("train", "val")


def read(folder: Path) -> dict[str, list[tuple[str, dict[str, bytes]]]]:
    """split -> list of (key, members)."""
    readers = {split: ShardReader(ShardIndex.load(folder / split)) for split in SPLITS}
    return {split: [reader[i][1:] for i in range(len(reader))] for split, reader in readers.items()}


def test_files_are_those_of_the_index_and_samples_say_what_they_are():
    indices = {split: ShardIndex.load(DATA / "fruit64" / split) for split in SPLITS}
    classes, counts, small = indices["train"].classes, [], []
    assert len(classes) == 14
    assert classes == indices["val"].classes
    for (split, samples), total in zip(read(DATA / "fruit64").items(), (1186, 207), strict=True):
        assert indices[split].num_samples == len(samples) == total
        assert all(file_sha256(indices[split].root / shard.name) == shard.sha256 for shard in indices[split].shards)
        for key, members in samples:
            about = json.loads(members["json"])
            assert classes[int(members["cls"])] == about["fine"]
            assert key == f"{about['fine'].lower()}-{about['source_row']:04d}"
            assert about["coarse"] in ("Apple", "Melon", "Pear", "Satsumas", "Orange")
        counts.append(np.bincount([int(members["cls"]) for _, members in samples], minlength=14))
        images = [Image.open(io.BytesIO(members["jpg"])) for _, members in samples]
        assert {image.size for image in images} == {(64, 64)}
        small.append(
            np.stack([np.asarray(i.resize((8, 8), Image.Resampling.BOX), dtype=float).ravel() for i in images])
        )
    share = counts[1] / sum(counts)
    assert 0.13 < share.min() <= share.max() < 0.17, "stratified"

    def nearest(a, b):
        """RMS of pixel values: another measure than the one that made the clusters of near-duplicates."""
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return np.sqrt(np.maximum(squares, 0) / a.shape[1])

    train, val = small
    within = nearest(train, train) + 1e9 * np.eye(len(train))
    close = 15.0  # photos of one burst come closer than this
    assert (within.min(1) < close).sum() > 20  # there are such pairs on one side
    assert nearest(val, train).min() > close


def test_the_script(tmp_path, monkeypatch, capsys):
    """Forty pictures, of which ten are there twice and ten have a shifted copy, which stays on their side."""
    rows = []
    for number in range(40):
        image = picture(number).resize((90, 110))
        for left, top in [(0, 0), *([(0, 0)] if number < 10 else [(6, 4)] if number < 20 else [])]:
            jpeg = io.BytesIO()
            image.crop((left, top, left + 80, top + 100)).save(jpeg, "JPEG", quality=95)
            row = {"finegrained_cat": "ab"[number % 2], "coarse_cat": "Fruit", "dataset": "train"}
            rows.append(row | {"image_data": jpeg.getvalue()})
    pd.DataFrame(rows).to_parquet(tmp_path / "photos.parquet")
    spec = importlib.util.spec_from_file_location("build_fruit64", DATA / "build_fruit64.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.build(tmp_path / "photos.parquet", tmp_path / "a")
    assert "60 rows, 50 distinct photos, 2 classes" in capsys.readouterr().out
    split_of = {
        json.loads(m["json"])["source_row"]: s for s, samples in read(tmp_path / "a").items() for _, m in samples
    }
    assert set(split_of.values()) == set(SPLITS)
    assert all(split_of[row] == split_of[row + 1] for row in range(20, 40, 2))
    # rebuilt, the bytes are the same; and it is noticed where they are not
    options = ["x", "--parquet", str(tmp_path / "photos.parquet"), "--output", str(tmp_path / "a"), "--check"]
    monkeypatch.setattr(sys, "argv", options)
    script.main()
    path = tmp_path / "a" / "val" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))
    with pytest.raises(SystemExit, match="differs from the rebuilt split"):
        script.main()
