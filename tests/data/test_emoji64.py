"""The embedded captioned pictures as they lie in the repository, and the rules of the script that makes them."""

import importlib.util
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import prompts
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex
from dar_lightning.files import file_sha256
from dar_lightning.metrics.color_edges import ColorEdges

DATA = Path(__file__).parents[2] / "data"
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
