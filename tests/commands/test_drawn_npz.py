"""Evaluating an npz: how it was drawn is read from the record beside it, if that is of these images."""

import json
import shutil

import numpy as np
import pytest
from tiny_models import make_ar, make_tokenizer, write_images

from dar_lightning import DARPipeline
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.sample import sample
from dar_lightning.commands.table import Row, table
from dar_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer, ar = make_tokenizer(), make_ar()
    tokenizer.averaged, ar.averaged = True, False
    DARPipeline(tokenizer, ar).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("reference"), 6)


def facts(npz, reference, output, **options) -> dict:
    return evaluate(str(npz), reference, "color_edges", str(output), device="cpu", **options)["protocol"]["samples"]


def test_what_dar_sample_draws(pipeline, reference, tmp_path):
    sample(str(tmp_path), pipeline, per_class=2, seed=3, guidance=(1.0, 2.0), solver="euler", device="cpu")
    found = facts(tmp_path / "samples.npz", reference, tmp_path / "o.json")
    expected = {"npz": str(tmp_path / "samples.npz"), "n": 8, "seed": 3, "guidance": [1.0, 2.0], "solver": "euler"}
    assert expected.items() <= found.items()
    assert (found["steps"], found["ema"]) == (4, {"tokenizer": True, "ar": False})


def test_what_dar_predict_draws_and_what_the_pipeline_draws_itself(pipeline, reference, tmp_path):
    """The same bits if the rows are as many."""
    rows = [Row(guidance=2.0, num_steps=8)]
    table(
        "T",
        "generate",
        rows,
        pipeline,
        reference,
        str(tmp_path),
        "color_edges",
        num_samples=5,
        seeds=[7],
        batch_size=32,
    )
    drawn = facts(tmp_path / "row0/seed7/samples.npz", reference, tmp_path / "a.json")
    options = {"num_samples": 5, "seed": 7, "guidance": 2.0, "num_steps": 8, "batch_size": 2}
    itself = facts(pipeline, reference, tmp_path / "b.json", **options)
    names = ["seed", "guidance", "temperature", "top_k", "top_p", "solver", "steps", "rows", "ema", "classes", "n"]
    names += ["tokenizer_sha256", "ar_sha256", "sha256"]
    assert {name: drawn[name] for name in names} == {name: itself[name] for name in names}
    assert drawn["steps"] == 8
    assert drawn["provenance"][0]["versions"]


def test_a_record_of_other_images_is_refused(pipeline, reference, tmp_path):
    sample(str(tmp_path / "a"), pipeline, per_class=1, device="cpu")
    with np.load(tmp_path / "a/samples.npz") as arrays:
        images = arrays["arr_0"].copy()
    images[0, 0, 0, 0] ^= 1
    npz = tmp_path / "a/samples.npz"
    np.savez(npz, arr_0=images)
    with pytest.raises(
        UserError, match=r"^--samples: .*samples\.json tells of other images \([0-9a-f]{12}\) than"
    ) as e:
        facts(npz, reference, tmp_path / "o.json")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "o.json").exists()
    (tmp_path / "a/samples.json").unlink()
    assert "seed" not in facts(npz, reference, tmp_path / "o.json")


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", json.dumps({"metrics": {}, "protocol": {}})])
def test_another_json_beside_says_nothing(reference, tmp_path, content):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    (tmp_path / "x.json").write_text(content)
    assert facts(tmp_path / "x.npz", reference, tmp_path / "o.json").keys() == {"npz", "n", "sha256"}


def test_the_weights_say_whether_they_are_an_average(pipeline, tmp_path):
    again = DARPipeline.from_pretrained(pipeline)
    assert again.averaged == {"tokenizer": True, "ar": False}
    again.save_pretrained(tmp_path / "copy")
    assert DARPipeline.from_pretrained(tmp_path / "copy").averaged == {"tokenizer": True, "ar": False}
    assert DARPipeline.from_pretrained("fruit64").averaged == {"tokenizer": True, "ar": True}
    make_ar().save_pretrained(tmp_path / "unknown")
    assert "ema" not in json.loads((tmp_path / "unknown/config.json").read_text())

    shutil.copytree(pipeline, tmp_path / "wrong")
    config = tmp_path / "wrong/ar/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ema": "yes"}))
    with pytest.raises(UserError, match=r"config\.json: ema is 'yes', need true or false"):
        DARPipeline.from_pretrained(tmp_path / "wrong")
