"""A model of a text encoder's features whose encoder is not where it was: `dar sample`, the page's code, the page."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from tiny_encoder import write_encoder
from tiny_models import make_ar, make_tokenizer

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.commands import serve as command
from dar_lightning.commands.serve_page import repeat
from dar_lightning.data.transforms import to_uint8
from dar_lightning.files import file_sha256

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("encoder")
    write_encoder(root / "bert", "bert")
    options = {"channels": 16, "length": 6, "encoder": "./nowhere"}
    options["sha256"] = file_sha256(root / "bert/model.safetensors")
    ar = make_ar(condition="features", condition_options=options)
    DARPipeline(make_tokenizer(), ar).save_pretrained(root / "pipeline")
    return root


def test_prompts_for_an_encoder_that_was_moved(root, tmp_path):
    pipeline, encoder = str(root / "pipeline"), str(root / "bert")
    told, python = repeat(pipeline, PROMPT, 0, 2.0, None, 0, encoder=encoder)
    main([*shlex.split(told)[1:-1], str(tmp_path / "one")])
    drawn = np.asarray(Image.open(tmp_path / "one/images/000-0.png")).astype(int)
    exec(python, found := {})
    assert np.abs(to_uint8(found["image"])[0].permute(1, 2, 0).numpy() - drawn).max() <= 1
    record = json.loads((tmp_path / "one/samples.json").read_text())
    assert record["encoder"] == encoder
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    again = np.asarray(Image.open(tmp_path / "again/images/000-0.png")).astype(int)
    assert np.array_equal(again, drawn)
    main(["sample", f"--pipeline={pipeline}", f"--encoder={encoder}", "--prompt=apple", f"--output={tmp_path}/other"])
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "other/images/000-0.png")), drawn)


def test_the_page_looks_for_the_encoder_before_it_listens(root, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(command, "build_page", None)
    refused(r"encoder: \./nowhere is not a folder", command.serve, str(root / "pipeline"))
