"""Mistakes with conditions: one line before the work begins, and nothing left behind."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal, refused
from tiny_models import AR, CLASSES, fit_ar, make_ar, make_pipeline, make_tokenizer, write_images, write_tokens

from dar_lightning import DARPipeline
from dar_lightning.ar import conditions
from dar_lightning.ar.conditions import ClassLabel
from dar_lightning.cli import main
from dar_lightning.commands import export as command
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.serve_page import Work, build_page
from dar_lightning.errors import UserError
from dar_lightning.metrics.images import DrawnImages

SAMPLES = "--trainer.callbacks+=dar_lightning.training.callbacks.Samples"
BLIND = "this model has no condition to guide by, leave it at 1"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Token shards, a tokenizer, a pipeline without condition, and pictures to measure against."""
    root = tmp_path_factory.mktemp("root")
    write_tokens(root / "tokens", 8)
    make_tokenizer().save_pretrained(root / "tokenizer")
    DARPipeline(make_tokenizer(), make_ar(condition="none")).save_pretrained(root / "none")
    np.savez(root / "real.npz", arr_0=np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8))
    return root


def fit(root, folder, config: dict, *more: str, **trainer) -> list[str]:
    words = fit_ar(root / "tokens", root / "tokens", folder, max_steps=1, limit_val_batches=1, **trainer)
    return [*words, f"--model.init_args.config={json.dumps(AR | config)}", *more]


def test_guidance_without_condition(root, tmp_path, capsys):
    samples = (SAMPLES, f"--trainer.callbacks.tokenizer={root}/tokenizer", "--trainer.callbacks.guidance=3")
    draw = ["sample", f"--pipeline={root}/none", "--guidance=3", f"--output={tmp_path}/drawn", "--device=cpu"]
    measure = ["evaluate", f"--samples={root}/none", f"--reference={root}/real.npz", "--features=color_edges"]
    measure += ["--guidance=3", f"--output={tmp_path}/metrics.json", "--device=cpu"]
    predict = ["predict", "--model=dar_lightning.generation.predict.GenerationModule", "--model.init_args.guidance=3"]
    predict += [f"--model.init_args.pipeline={root}/none", "--data=dar_lightning.generation.labels.LabelsDataModule"]
    predict += ["--data.init_args.num_images=4", f"--trainer.default_root_dir={tmp_path}/predicted"]
    predict.append("--trainer.callbacks+=dar_lightning.generation.writer.SampleWriter")
    predict += [f"--trainer.callbacks.output={tmp_path}/predicted/samples.npz", "--trainer.accelerator=cpu"]
    for words in (fit(root, tmp_path / "run", {"condition": "none"}, *samples), draw, measure, predict):
        assert re.search(f"guidance is 3(.0)?: {BLIND}", refusal(capsys, words))
        assert not list(tmp_path.iterdir())
    main([*predict, "--model.init_args.guidance=1"])
    assert set(np.load(tmp_path / "predicted/samples.npz")) == {"arr_0"}  # there are no labels
    about = json.loads((tmp_path / "predicted/samples.json").read_text())
    assert about["classes"] == "none: no condition"


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("prompts=[red]", "prompts: this model takes labels, not text"),
        ("classes=[5]", "labels are from 5 to 5: need 0 to 3"),
    ],
)
def test_samples_that_cannot_be_drawn(option, line, root, tmp_path, capsys):
    words = (SAMPLES, f"--trainer.callbacks.tokenizer={root}/tokenizer", f"--trainer.callbacks.{option}")
    assert line in refusal(capsys, fit(root, tmp_path / "run", {}, *words))
    assert not list(tmp_path.iterdir())


def test_a_probe_of_pictures_without_condition(root, tmp_path):
    real = write_images(root / "images", 8)
    options = {"features": "color_edges", "output": str(tmp_path / "o.json"), "device": "cpu"}
    refused(
        "--samples has no labels, which the linear probe needs",
        evaluate,
        str(root / "none"),
        real,
        probe_train=real,
        **options,
    )
    result = evaluate(str(root / "none"), real, **options)
    assert result["protocol"]["samples"]["classes"] == "none: no condition"
    assert DrawnImages(make_pipeline(), 2, 0).protocol["classes"] == "balanced: image i is of class i mod num_classes"


class Named(ClassLabel):
    """Somebody's own condition that takes labels."""


def test_class_names_go_to_whatever_takes_labels(root, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions.CONDITIONS, "classes", dict(conditions.CONDITIONS.classes))
    conditions.register_condition(Named, "tests.Named")
    made = {"own": make_ar(condition="tests.Named", condition_options={"num_classes": 4})}
    made["none"] = make_ar(condition="none")
    monkeypatch.setattr(command, "load_lightning_checkpoint", lambda ckpt, weights: made[ckpt.name])
    common = {"tokenizer": str(root / "tokenizer"), "shards": root / "tokens"}
    command.export(Path("own"), output=tmp_path / "own", **common)
    assert DARPipeline.from_pretrained(tmp_path / "own").classes == CLASSES
    with pytest.raises(UserError, match=r"shards is .*: class names are of no use to a model that takes nothing"):
        command.export(Path("none"), output=tmp_path / "none", **common)
    assert not (tmp_path / "none").exists()


def test_the_page_reads_no_book(root):
    gradio = pytest.importorskip("gradio")
    options = {"vocabulary": "[PAD] [UNK] a", "length": 2}
    pipe = DARPipeline(make_tokenizer(), make_ar(condition="caption_tokens", condition_options=options))
    page = build_page(gradio, pipe, "tiny", max_upload_mb=1, work=Work())
    (draw,) = [each.fn for each in page.fns.values() if each.api_name == "draw"]
    with pytest.raises(gradio.Error, match="the prompt has 1001 letters: at most 1000 are read"):
        next(draw("a" * 1001, 0, 1, None, 0))
    assert {each.max_length for each in page.blocks.values() if getattr(each, "label", "") == "Prompt"} == {1000}
