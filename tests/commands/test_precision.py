"""`--dtype` and `--compile` of the commands that draw: what the models compute when they are cast by hand."""

import json
import shlex

import numpy as np
import pytest
import torch
from refusals import refusal
from tiny_models import picture, write_images

from dar_lightning.cli import main
from dar_lightning.commands import reconstruct, sample
from dar_lightning.data.transforms import to_uint8
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_generator, image_seed
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.layers import compile_blocks


@pytest.fixture
def compiled(monkeypatch) -> list:
    """The modules that the commands have compiled; tests/training shows that compiled blocks compute the same."""
    parts: list = []
    for command in (sample, reconstruct):
        monkeypatch.setattr(command, "compile_blocks", lambda *given: parts.extend(given))
        monkeypatch.setattr(command, "check_compiler", lambda device: None)
    return parts


def cast(pipeline: str) -> DARPipeline:
    return DARPipeline.from_pretrained(pipeline).to(torch.bfloat16)


def test_sample(pipeline, tmp_path, compiled):
    words = ["--pipeline", pipeline, "--device", "cpu", "--classes", "1,3", "--per_class", "1", "--guidance", "2"]
    main(["sample", *words, "--dtype", "bfloat16", "--compile", "true", "--output", str(tmp_path / "drawn")])
    assert [type(part).__name__ for part in compiled] == ["PixelDecoder"]
    generators = [torch.Generator().manual_seed(image_seed(0, label, 0)) for label in (1, 3)]
    images = cast(pipeline).generate(torch.tensor([1, 3]), guidance=2.0, generator=generators)
    with np.load(tmp_path / "drawn/samples.npz") as drawn:
        assert np.array_equal(drawn["arr_0"], to_uint8(images).permute(0, 2, 3, 1).numpy())
    record = json.loads((tmp_path / "drawn/samples.json").read_text())
    assert (record["dtype"], record["compile"]) == (dict.fromkeys(("tokenizer", "ar"), "bfloat16"), True)
    stored = DARPipeline.from_pretrained(pipeline)
    assert record["weights"] == {"tokenizer": model_sha256(stored.tokenizer), "ar": model_sha256(stored.ar)}
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    assert len(compiled) == 2
    again = json.loads((tmp_path / "again/samples.json").read_text())
    assert again["pixels_sha256"] == record["pixels_sha256"]


def test_reconstruct(pipeline, tmp_path, compiled):
    words = ["reconstruct", "--tokenizer", f"{pipeline}/tokenizer", "--shards", write_images(tmp_path / "shards", 6)]
    words += ["--device", "cpu", "--dtype", "bfloat16", "--compile", "true", "--seed", "2", "--num_exchanged", "0"]
    main([*words, "--output", str(tmp_path)])
    assert [type(part).__name__ for part in compiled] == ["Encoder", "PixelDecoder"]
    originals = np.stack([np.array(picture(number)) for number in range(6)])
    model = cast(pipeline).tokenizer
    codes = model.tokenize(torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1)
    noise = model.draw_noise(6, [image_generator(2, number) for number in range(6)])
    images = to_uint8(model.detokenize(codes, noise)).permute(0, 2, 3, 1).numpy()
    errors = np.square(images.astype(float) - originals).mean(axis=(1, 2, 3))
    result = json.loads((tmp_path / "reconstruction.json").read_text())
    assert result["metrics"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)
    assert {"dtype": "bfloat16", "compile": True}.items() <= result["protocol"]["samples"].items()


def test_weights_stay_as_they_are_stored(pipeline, tmp_path, compiled):
    cast(pipeline).save_pretrained(tmp_path / "half")
    records = []
    for dtype in (None, "bfloat16", "float32"):
        sample.sample(str(tmp_path / "drawn"), str(tmp_path / "half"), per_class=2, dtype=dtype, device="cpu")
        records.append(json.loads((tmp_path / "drawn/samples.json").read_text()))
    stored, same, exact = records
    assert [record["dtype"]["ar"] for record in records] == ["bfloat16", "bfloat16", "float32"]
    assert stored["pixels_sha256"] == same["pixels_sha256"] != exact["pixels_sha256"]
    assert stored["weights"] == exact["weights"]
    assert "--dtype" not in stored["command"]
    assert compiled == [], "only when it is asked for"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--compile", "true"], "compile: on a CPU this needs a C++ compiler, and there is no no-such-compiler"),
        (["--dtype", "float16"], "dtype"),
    ],
)
def test_what_cannot_be_is_one_line(pipeline, tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ["sample", "--pipeline", pipeline, "--device", "cpu", *option, "--output", tmp_path / "drawn"]
    assert message in refusal(capsys, words)
    assert not (tmp_path / "drawn").exists()


def test_a_compiled_decoder_draws_the_same(pipeline, monkeypatch):
    """In batches of several sizes, each of whose groups brings other shapes; by a compiler of graphs alone."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiler(module, backend="aot_eager"))
    plain, compiled = DARPipeline.from_pretrained(pipeline), DARPipeline.from_pretrained(pipeline)
    compile_blocks(compiled.tokenizer.decoder)
    for count in (3, 1):
        labels = torch.arange(count)
        images = [pipe.generate(labels, generator=torch.Generator().manual_seed(0)) for pipe in (plain, compiled)]
        torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)
    assert all(block._compiled_call_impl is not None for block in compiled.tokenizer.decoder.blocks)
