"""The linear probe knows classes by their names, in samples and reference, whatever their numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_sets import npz, pixels, shards

from dar_lightning.commands.evaluate import evaluate
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import UserError


def named(path: Path, images: np.ndarray, *classes: str) -> str:
    """Shards whose image i has label i mod 2, a reddish picture label 0; their names are these."""
    source = shards(path, images)
    replace(ShardIndex.load(source), classes=classes).save()
    return source


@pytest.fixture
def probe(tmp_path):
    """Evaluates samples with a probe of shards whose reddish class is "red", the greenish "green"."""
    train = named(tmp_path / "train", pixels(40, 0), "red", "green")
    real = named(tmp_path / "real", pixels(20, 1), "red", "green")

    def run(samples: str) -> dict:
        return evaluate(samples, real, "color_edges", str(tmp_path / "o.json"), probe_train=train, device="cpu")

    return run


@pytest.mark.parametrize(
    ("classes", "accuracy"),
    [(("red", "green"), 1.0), (("green", "red"), 0.0), (("red", "green", "blue"), 1.0)],  # of blue there is none
)
def test_by_name(classes, accuracy, probe, tmp_path):
    result = probe(named(tmp_path / "s", pixels(20, 2), *classes))
    assert result["metrics"]["probe_accuracy_samples"] == accuracy
    assert result["metrics"]["probe_accuracy_reference"] == 1.0
    assert result["protocol"]["probe"]["classes_matched_by"] == {"samples": "name", "reference": "name"}


def test_other_classes_are_refused(probe, tmp_path):
    with pytest.raises(UserError, match=r"^--samples: its class blue is none of --probe_train, which has red, green"):
        probe(named(tmp_path / "s", pixels(20, 2), "red", "blue"))


def test_an_npz_has_the_names_of_the_record_beside_it(probe, tmp_path):
    samples = npz(tmp_path / "s.npz", pixels(20, 2), labels=np.arange(20) % 2)
    result = probe(samples)
    assert result["metrics"]["probe_accuracy_samples"] == 1.0
    assert result["protocol"]["probe"]["classes_matched_by"]["samples"] == "number", "which is said"
    record = {"pixels_sha256": result["protocol"]["samples"]["sha256"], "class_names": ["green", "red"]}
    (tmp_path / "s.json").write_text(json.dumps(record))
    result = probe(samples)
    assert result["metrics"]["probe_accuracy_samples"] == 0.0
    assert "class_names" not in result["protocol"]["samples"]
