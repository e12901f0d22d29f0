"""`dar table`: rows that are what `dar predict`, the tokenizer and `dar evaluate` give, and that go on after a stop."""

import json
import shutil
import statistics
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_sets import NETWORK
from PIL import Image
from refusals import refused
from tiny_models import CLASSES, CODES, TOKENS, make_ar, make_tokenizer, picture, write_images

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.table import Row, _write, table
from dar_lightning.data.transforms import to_float, to_tensor, to_uint8
from dar_lightning.generation.drawing import image_generator
from dar_lightning.generation.npz import write_npz

CONFIGS = {}  # what its rows change -> a table of the paper; tests/test_configs.py parses all
for path in sorted((Path(__file__).parents[2] / "experiments/evaluate").glob("*.yaml")):
    if rows := yaml.safe_load(path.read_text()).get("rows"):
        CONFIGS[frozenset(chain(*rows))] = path
DISTANCE = f"FD-{NETWORK}"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    """With as many groups as the paper's."""
    folder = tmp_path_factory.mktemp("pipeline")
    DARPipeline(make_tokenizer(num_groups=TOKENS), make_ar(), CLASSES).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("reference"), 6)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def drawn(pipeline, reference, output, **changes) -> dict:
    rows = [Row(paper={"FID": 7.43}), Row(guidance=(1.0, 3.0), groups=2, paper={"FID": 2.44, "IS": 263.0})]
    options = {"title": "A", "task": "generate", "rows": rows, "pipeline": pipeline, "reference": reference}
    options |= {"output": str(output), "features": NETWORK, "num_samples": 5, "batch_size": 3, "device": "cpu"}
    table(**options | {"seeds": [0, 7]} | changes)
    return read(output / "table.json")


@pytest.fixture(scope="module")
def whole(pipeline, reference, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    drawn(pipeline, reference, output)
    return output


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "x"))


def test_drawn_rows(pipeline, reference, whole, tmp_path):
    """The images are the pipeline's, the metrics evaluate's, their mean and deviation the library's."""
    found = read(whole / "table.json")
    pipe = DARPipeline.from_pretrained(pipeline)
    for number, options in enumerate([{}, {"guidance": (1.0, 3.0), "groups": 2}]):
        values = []
        for seed in (0, 7):
            samples = whole / f"row{number}" / f"seed{seed}" / "samples.npz"
            generators = [image_generator(seed, i) for i in range(5)]
            images = to_uint8(pipe.generate(torch.arange(5) % 4, generator=generators, **options))
            with np.load(samples) as arrays:
                assert np.abs(arrays["arr_0"].astype(int) - images.permute(0, 2, 3, 1).numpy()).max() <= 1
            values.append(evaluate(str(samples), reference, NETWORK, str(tmp_path / "x.json"))["metrics"][DISTANCE])
        metric = found["rows"][number]["metrics"][DISTANCE]
        assert metric["values"] == pytest.approx(values)
        assert values[0] != values[1]
        assert (metric["mean"], metric["std"]) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert [row["settings"]["tokens"] for row in found["rows"]] == ["8 of 8", "2 of 8"]

    text = (whole / "table.md").read_text()
    assert f"| guidance | tokens | {DISTANCE} | paper: FID | paper: IS |" in text
    first, second = text.splitlines()[-2:]
    assert (first[:18], first[-12:]) == ("| none | 8 of 8 | ", " | 7.43 |  |")
    assert (second[:20], second[-15:]) == ("| 1 to 3 | 2 of 8 | ", " | 2.44 | 263 |")
    assert "5 images, 6 of reference, seeds 0, 7. This is not the paper's FID" in text
    with Image.open(whole / "table.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**20)) > 20


def test_it_goes_on(pipeline, reference, whole, copy):
    """What is measured is not drawn again; what is drawn is only measured; another seed is added."""
    (copy / "row0/seed0/samples.npz").unlink()  # no longer needed
    (copy / "row1/seed0/measured.json").unlink()
    kept = copy / "row1/seed0/samples.npz"
    before, expected = kept.stat().st_mtime_ns, read(whole / "table.json")["rows"]
    found = drawn(pipeline, reference, copy)["rows"]
    assert found[0] == expected[0]
    assert found[1]["metrics"] == expected[1]["metrics"]
    assert kept.stat().st_mtime_ns == before
    assert not (copy / "row0/seed0/samples.npz").exists()
    more = drawn(pipeline, reference, copy, seeds=[0, 7, 8])
    assert [len(row["metrics"][DISTANCE]["values"]) for row in more["rows"]] == [3, 3]


def test_other_images_at_the_same_places_are_not_taken_for_those_that_were_measured(pipeline, copy, tmp_path):
    """The table is moved, and so is the reference: the same images elsewhere are the same reference."""
    place, measured = tmp_path / "reference", copy / "row0/seed0/measured.json"
    write_images(place, 6)
    before = read(measured)
    drawn(pipeline, str(place), copy)
    assert read(measured) == before

    images = np.load(copy / "row0/seed0/samples.npz")["arr_0"].copy()
    digest = write_npz(copy / "row0/seed0/samples.npz", [images[::-1]], images.shape)
    record = copy / "row0/seed0/samples.json"
    record.write_text(json.dumps(read(record) | {"pixels_sha256": digest}))
    drawn(pipeline, str(place), copy)
    assert read(measured)["protocol"]["samples"]["sha256"] == digest != before["protocol"]["samples"]["sha256"]

    shutil.rmtree(place)
    write_images(place, 7)
    refused(r"measured\.json has reference_sha256 [0-9a-f]{64}, now it is", drawn, pipeline, str(place), copy)


def test_stored_statistics_and_more_metrics(pipeline, reference, tmp_path):
    pytest.importorskip("torch_fidelity")
    rows, stored = [Row(paper={"FID": 7.43})], str(tmp_path / "statistics.npz")
    found = drawn(pipeline, reference, tmp_path / "a", rows=rows, full=True)["rows"][0]["metrics"]
    assert f"precision-{NETWORK}" in found
    samples = str(tmp_path / "a/row0/seed0/samples.npz")
    evaluate(samples, reference, NETWORK, str(tmp_path / "o.json"), save_statistics=stored)
    before = torch.get_float32_matmul_precision()
    found = drawn(pipeline, stored, tmp_path / "b", rows=rows)
    assert torch.get_float32_matmul_precision() == before, "a setting of the whole process"
    assert "5 images, the reference's stored statistics, seeds 0, 7." in found["caveat"]
    sampling = found["rows"][0]["protocol"]["samples"]
    assert (sampling["seed"], sampling["ema"]) == (0, {"tokenizer": None, "ar": None})
    refused(r"^--full: .* has statistics only", drawn, pipeline, stored, tmp_path / "c", rows=rows, full=True)
    assert not (tmp_path / "c").exists(), "found before anything is drawn"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "mobilenet_v2", "features_weights": "none.pt"}, "features_weights none.pt|none.pt is missing"),
        ({"full": True}, r"measured\.json has full False, now it is True"),
        ({"num_samples": 6}, r"measured\.json has num_samples 5, now it is 6"),
        ({"rows": [Row(solver="euler")]}, r"measured\.json has settings"),
        ({"seeds": []}, "seeds \\[\\]"),
        ({"seeds": [1, 1]}, "one seed or several that differ"),
        ({"rows": []}, "0 rows"),
        ({"task": "reconstruct"}, "guidance is set"),
        ({"rows": [Row(num_steps=3), Row(pipeline="./nowhere")]}, r"\./nowhere is not a folder"),
    ],
)
def test_mistakes(changes, message, pipeline, reference, whole):
    before = sorted(whole.rglob("*"))
    refused(message, drawn, pipeline, reference, whole, **changes)
    assert sorted(whole.rglob("*")) == before, "found before anything is drawn"


def test_a_solver_that_is_none():
    refused("solver is 'eular'", Row, solver="eular")


def test_reconstructed_rows(pipeline, reference, tmp_path):
    """Of the last tokenizer, two steps share tokens: the first one needs all of its window."""
    make_tokenizer(tokens_per_step=TOKENS // 2).save_pretrained(tmp_path / "shared")
    other = Row(pipeline=str(tmp_path / "shared"), groups=1)
    rows = [Row(solver="euler", num_steps=3, paper={"FID": 2.35}), Row(groups=4), other]
    table("B", "reconstruct", rows, pipeline, reference, str(tmp_path), NETWORK, seeds=[3], batch_size=4, device="cpu")
    tokenizer = DARPipeline.from_pretrained(pipeline).tokenizer
    images = to_float(torch.stack([to_tensor(picture(i)) for i in range(6)]))
    for number, options in enumerate([{"solver": "euler", "num_steps": 3}, {"groups": 4}]):
        noise = tokenizer.draw_noise(6, [image_generator(3, i) for i in range(6)])
        decoded = to_uint8(tokenizer.detokenize(tokenizer.tokenize(images), noise, **options))
        with np.load(tmp_path / f"row{number}" / "seed3" / "samples.npz") as arrays:
            assert np.abs(arrays["arr_0"].astype(int) - decoded.permute(0, 2, 3, 1).numpy()).max() <= 1
    found = read(tmp_path / "table.json")["rows"]
    assert {DISTANCE, "psnr", "ssim"} <= found[0]["metrics"].keys()
    assert found[0]["metrics"]["psnr"]["std"] is None
    assert [row["settings"]["tokens"] for row in found[1:]] == [f"{TOKENS // 2} of {TOKENS}"] * 2


def test_an_infinite_psnr(tmp_path):
    distance = {"FD-x": {"mean": 0.5, "std": None, "values": [0.5]}}
    metrics = [distance | {"psnr": {"mean": 14.2, "std": None, "values": [14.2]}}, distance]
    common = {"paper": {}, "seeds": [0], "protocol": {"samples": {"n": 2}, "reference": {"n": 2}}}
    rows = [common | {"settings": {"pipeline": "p", "steps": 1 + i}, "metrics": metrics[i]} for i in range(2)]
    _write(tmp_path, "T", "FD-x", rows, {})
    assert (tmp_path / "table.md").read_text().splitlines()[-2:] == ["| 1 | 0.5 | 14.2 |", "| 2 | 0.5 | infinite |"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda path: path.stem)
def test_every_kind_of_table_of_the_paper_runs(config, pipeline, reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer/codebook4096/exported", "fruit64_codes256"):
        make_tokenizer(codebook_size=2 * CODES).save_pretrained(tmp_path / "runs" / name)
    given = yaml.safe_load(config.read_text())
    words = ["--config", config, "--pipeline", pipeline, "--reference", reference, "--output", tmp_path / "out"]
    words += ["--features", NETWORK, "--device", "cpu"] + (["--num_samples", 4] if given["task"] == "generate" else [])
    main(["table", *map(str, words)])
    rows = read(tmp_path / "out" / "table.json")["rows"]
    assert [row["paper"] for row in rows] == [row["paper"] for row in given["rows"]]
    values = [row["metrics"][DISTANCE]["mean"] for row in rows]
    assert np.isfinite(values).all()
    assert len(set(values)) == len(values), "each row changes the images"
