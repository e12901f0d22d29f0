"""The embedded photos and emoji as they lie in the repository, and the scripts that make them."""

import importlib.util
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_shards import picture

from benchmarks import prompts
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex
from dar_lightning.files import file_sha256
from dar_lightning.metrics.color_edges import ColorEdges

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
        tiny = [image.resize((8, 8), Image.Resampling.BOX) for image in images]
        small.append(np.stack([np.asarray(image, dtype=float).ravel() for image in tiny]))
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
    found = read(tmp_path / "a").items()
    split_of = {json.loads(m["json"])["source_row"]: split for split, samples in found for _, m in samples}
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


COUNTS = {"train": 2187, "val": 279, "val_styles": 97}


def test_captions_and_splits_are_what_the_readme_says():
    names, styles, pictures, classes = {}, {}, [], None
    for split, count in COUNTS.items():
        index = ShardIndex.load(DATA / "emoji64" / split)
        assert index.num_samples == count
        assert all(file_sha256(index.root / shard.name) == shard.sha256 for shard in index.shards)
        assert classes in (None, index.classes)
        classes, reader = index.classes, ShardReader(index)
        samples = [reader[number][1:] for number in range(count)]
        about = [json.loads(members["json"]) for _, members in samples]
        names[split] = [each["name"] for each in about]
        styles[split] = Counter(each["style"] for each in about)
        for (key, members), each in zip(samples, about, strict=True):
            assert key == f"{each['style']}-{each['emoji']}"
            assert members["txt"].decode() == f"{each['name']}, {each['style']} style"
            assert 0 <= int(members["cls"]) < len(classes) == 5
            image = Image.open(io.BytesIO(members["webp"]))
            assert image.size == (64, 64)
            assert image.mode == "RGB"
            pictures.append((split, each["name"], np.asarray(image)))
    assert not set(names["val"]) & set(names["train"] + names["val_styles"]), "names of val are unseen"
    assert set(names["val_styles"]) <= set(names["train"]), "names of val_styles are known in another style"
    assert len(names["val_styles"]) == len(set(names["val_styles"]))
    assert all(len(counts) == 3 for counts in styles.values())
    assert len({picture.tobytes() for *_, picture in pictures}) == len(pictures), "no picture is there twice"
    corners = np.mean([picture[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 240 for *_, picture in pictures])
    assert corners > 0.7, "on white"


def test_rules_of_the_script():
    spec = importlib.util.spec_from_file_location("build_emoji64", DATA / "build_emoji64.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.words("Flag: Åland (Islands)") == "flag, aland, islands"
    assert script.plain("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert script.kin("26c4") == script.kin("2603")
    names = [script.Name(f"{number:x}", "", "", "", ()) for number in range(4000)]
    splits = [[script.split_of(name, style, list(script.STYLES)) for style in script.STYLES] for name in names]
    shares = {split: np.mean([row.count(split) for row in splits]) / 3 for split in script.SPLITS}
    assert abs(shares["val"] - 0.1) < 0.02
    assert abs(shares["val_styles"] - 0.045) < 0.01
    assert all(row.count("val") in (0, 3) and row.count("val_styles") <= 1 for row in splits)
    alone = [script.split_of(name, "noto", ["noto"]) for name in names]
    assert "val_styles" not in alone, "a name of one style is never held out"
    rng = np.random.default_rng(0)
    for image in (np.zeros((64, 64, 3), np.uint8), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)):
        back = np.asarray(Image.open(io.BytesIO(script.webp(Image.fromarray(image)))).convert("RGB")).astype(int)
        assert np.abs(back - image).max() <= 16


def test_the_prompts_benchmark_tells_a_model_that_follows_from_one_that_does_not(tmp_path, monkeypatch):
    """Stand-ins for a model: one draws the very picture that is asked for, one the same picture for all prompts."""
    pictures = prompts.read_pictures(DATA / "emoji64")
    places = {text: number for number, text in enumerate(pictures.prompts)}

    def measured(drawn_as) -> dict:
        def draw(pipe, jobs, *_):
            return [(pictures.images[[drawn_as(places[job.label])]], None) for job in jobs]

        monkeypatch.setattr(prompts, "draw_images", draw)
        found = prompts.rows(None, pictures, ColorEdges(), 40, 1.0, 0, tmp_path / "grid.png")
        return {(row["prompts"], row["pictures"]): row for row in found}

    faithful, deaf = measured(lambda number: number), measured(lambda number: 0)
    for split in prompts.SPLITS:
        assert faithful[split, "drawn"]["name"] == faithful[split, "drawn"]["style"] == 1
        assert faithful[split, "drawn"]["name error"] == 0
        assert deaf[split, "drawn"]["name"] < 0.1
        assert 0.15 < deaf[split, "drawn"]["style"] < 0.6
        assert faithful[split, "real"] == deaf[split, "real"]
        assert 0 <= faithful[split, "real"]["name"] < 1
        assert faithful[split, "chance"]["name"] <= round(2 / (len(pictures.names) - 1), 4)
        assert abs(faithful[split, "chance"]["style"] - 1 / 3) < 0.03
    assert Image.open(tmp_path / "grid.png").width > 12 * 64
