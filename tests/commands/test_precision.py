"""`--dtype` and `--compile` of the commands that draw: what the models compute when they are cast by hand."""

import json
import shlex

import numpy as np
import pytest
import torch
from tiny_models import make_pipeline, picture, write_images

from dar_lightning.cli import main
from dar_lightning.commands import evaluate, reconstruct, sample
from dar_lightning.data.transforms import to_uint8
from dar_lightning.drawing import image_seed
from dar_lightning.metrics.images import DrawnImages
from dar_lightning.pipeline import DARPipeline
from dar_lightning.seeding import image_generator


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("photos") / "shards", 6)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The modules that the commands have compiled; that compiled blocks compute the same is tested in tests/lit."""
    parts: list = []
    for command in (sample, reconstruct, evaluate):
        monkeypatch.setattr(command, "compile_blocks", lambda *given: parts.extend(given))
    return parts


def cast(pipeline: str) -> DARPipeline:
    return DARPipeline.from_pretrained(pipeline).to(torch.bfloat16)


def test_sample(pipeline, tmp_path, compiled):
    words = ["--pipeline", pipeline, "--classes", "1,3", "--per_class", "1", "--guidance", "2", "--dtype", "bfloat16"]
    main(["sample", *words, "--compile", "true", "--output", str(tmp_path / "drawn")])
    assert [type(part).__name__ for part in compiled] == ["PixelDecoder"]
    generators = [torch.Generator().manual_seed(image_seed(0, label, 0)) for label in (1, 3)]
    images = cast(pipeline).generate(torch.tensor([1, 3]), guidance=2.0, generator=generators)
    with np.load(tmp_path / "drawn/samples.npz") as drawn:
        assert np.array_equal(drawn["arr_0"], to_uint8(images).permute(0, 2, 3, 1).numpy())
    record = json.loads((tmp_path / "drawn/samples.json").read_text())
    assert (record["dtype"], record["compile"]) == ("bfloat16", True)
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    assert len(compiled) == 2
    again = json.loads((tmp_path / "again/samples.json").read_text())
    assert again["pixels_sha256"] == record["pixels_sha256"]

    main(["sample", *words[:-2], "--output", str(tmp_path / "float32")])
    assert json.loads((tmp_path / "float32/samples.json").read_text())["pixels_sha256"] != record["pixels_sha256"]
    assert len(compiled) == 2, "only when it is asked for"


def test_reconstruct(pipeline, photos, tmp_path, compiled):
    folder = f"{pipeline}/tokenizer"
    words = ["reconstruct", "--tokenizer", folder, "--shards", photos, "--output", str(tmp_path)]
    main([*words, "--dtype", "bfloat16", "--compile", "true", "--seed", "2"])
    assert [type(part).__name__ for part in compiled] == ["Encoder", "PixelDecoder"]
    originals = np.stack([np.array(picture(number)) for number in range(6)])
    model = cast(pipeline).tokenizer
    codes = model.tokenize(torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1)
    noise = model.draw_noise(6, [image_generator(2, number) for number in range(6)])
    images = to_uint8(model.detokenize(codes, noise)).permute(0, 2, 3, 1).numpy()
    errors = np.square(images.astype(float) - originals).mean(axis=(1, 2, 3))
    result = json.loads((tmp_path / "reconstruction.json").read_text())
    assert result["metrics"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)
    assert (result["protocol"]["dtype"], result["protocol"]["compile"]) == ("bfloat16", True)


def test_evaluate(pipeline, photos, tmp_path, compiled):
    words = ["evaluate", "--samples", pipeline, "--reference", photos, "--features", "color_edges", "--seed", "5"]
    words += ["--num_samples", "6", "--dtype", "bfloat16", "--compile", "true"]
    main([*words, "--output", str(tmp_path / "figures.json")])
    assert [type(part).__name__ for part in compiled] == ["PixelDecoder"]
    samples = json.loads((tmp_path / "figures.json").read_text())["protocol"]["samples"]
    assert (samples["dtype"], samples["compile"]) == ("bfloat16", True)
    expected = DrawnImages(cast(pipeline), 6, seed=5).protocol
    assert {name: samples[name] for name in expected} == expected


def test_weights_stay_as_they_are_stored(pipeline, tmp_path):
    cast(pipeline).save_pretrained(tmp_path / "half")
    sample.sample(str(tmp_path / "drawn"), str(tmp_path / "half"), per_class=1)
    sample.sample(str(tmp_path / "exact"), str(tmp_path / "half"), per_class=1, dtype="float32")
    drawn, exact = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("drawn", "exact"))
    assert (drawn["dtype"], exact["dtype"]) == ("bfloat16", "float32")
    assert drawn["weights"] == exact["weights"], "of the same values"
    assert "--dtype" not in drawn["command"]


def test_another_dtype_is_one_line(pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--pipeline", pipeline, "--dtype", "float16", "--output", str(tmp_path / "drawn")])
    assert stop.value.code == 2
    assert "dtype" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()
