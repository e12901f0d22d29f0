"""Evaluating an npz: how it was drawn is read from the record beside it, if that is of these images."""

import json

import numpy as np
import pytest
from image_sets import NETWORK, npz, pixels
from refusals import refused
from tiny_models import SIZE, make_ar, make_tokenizer

from dar_lightning import DARPipeline
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.sample import sample
from dar_lightning.commands.table import Row, table

EMA = {"tokenizer": True, "ar": False}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> str:
    """A pipeline that says whether its parts are averages."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = DARPipeline(make_tokenizer(), make_ar())
    pipe.tokenizer.averaged, pipe.ar.averaged = EMA.values()
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    return npz(tmp_path_factory.mktemp("reference") / "r.npz", pixels(6, 0, SIZE))


def facts(samples, reference, output, **options) -> dict:
    return evaluate(str(samples), reference, NETWORK, str(output), device="cpu", **options)["protocol"]["samples"]


def test_what_dar_sample_draws(averaged, reference, tmp_path):
    sample(str(tmp_path), averaged, per_class=2, seed=3, guidance=(1.0, 2.0), solver="euler", device="cpu")
    path, output = tmp_path / "samples.npz", tmp_path / "o.json"
    expected = {"npz": str(path), "n": 8, "seed": 3, "guidance": [1.0, 2.0], "solver": "euler", "steps": 4, "ema": EMA}
    assert expected.items() <= facts(path, reference, output).items()

    with np.load(path) as arrays:
        images = arrays["arr_0"].copy()
    images[0, 0, 0, 0] ^= 1
    npz(path, images)
    output.unlink()
    message = r"^--samples: .*samples\.json tells of other images \([0-9a-f]{12}\) than[^\n]*$"
    refused(message, facts, path, reference, output)
    assert not output.exists()


def test_what_dar_predict_draws_and_what_the_pipeline_draws_itself(averaged, reference, tmp_path):
    """The same bits if the rows are as many."""
    given = ("T", "generate", [Row(guidance=2.0, num_steps=8)], averaged, reference, str(tmp_path), NETWORK)
    table(*given, num_samples=5, seeds=[7], batch_size=32, device="cpu")
    drawn = facts(tmp_path / "row0/seed7/samples.npz", reference, tmp_path / "a.json")
    options = {"num_samples": 5, "seed": 7, "guidance": 2.0, "num_steps": 8, "batch_size": 2}
    itself = facts(averaged, reference, tmp_path / "b.json", **options)
    names = ["seed", "guidance", "temperature", "top_k", "top_p", "solver", "steps", "rows", "ema", "classes", "n"]
    names += ["tokenizer_sha256", "ar_sha256", "sha256"]
    assert {name: drawn[name] for name in names} == {name: itself[name] for name in names}
    assert drawn["steps"] == 8
    assert drawn["provenance"][0]["versions"]


@pytest.mark.parametrize("content", [None, "{}", "[1]", "no JSON"])
def test_another_json_beside_says_nothing(reference, tmp_path, content):
    npz(tmp_path / "x.npz", pixels(5, 1, SIZE))
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    assert facts(tmp_path / "x.npz", reference, tmp_path / "o.json").keys() == {"npz", "n", "sha256"}


def test_the_weights_say_whether_they_are_an_average(averaged, tmp_path):
    pipe = DARPipeline.from_pretrained(averaged)
    pipe.save_pretrained(tmp_path)
    assert pipe.averaged == DARPipeline.from_pretrained(tmp_path).averaged == EMA
    assert DARPipeline.from_pretrained("fruit64").averaged == {"tokenizer": True, "ar": True}
    config = tmp_path / "ar/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ema": "yes"}))
    refused(r"config\.json: ema is 'yes', need true or false", DARPipeline.from_pretrained, tmp_path)
