"""`dar evaluate`: real files in, a JSON with its protocol out, classes by name, records beside files, mistakes."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import NETWORK, FirstPixels, first_pixels, folder, frechet, npz, pixels, shards
from PIL import Image
from refusals import refused
from tiny_models import CLASSES, SIZE, make_ar, make_tokenizer

from dar_lightning import DARPipeline
from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.sample import sample
from dar_lightning.commands.table import Row, table
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import UserError
from dar_lightning.metrics import features
from dar_lightning.metrics.features import FrozenNetwork, network_sha256
from dar_lightning.metrics.images import DrawnImages
from dar_lightning.records.pixels import image_digests, set_sha256

RED_GREEN = NETWORK.replace("FirstPixels", "RedGreen")


@pytest.mark.parametrize(("kind", "batch_size"), [(npz, 7), (folder, 7), (shards, 64)])
def test_distance_from_every_source(tmp_path, kind, batch_size, capsys):
    samples, reference = pixels(31, 0), pixels(26, 1)
    source, output = kind(tmp_path / ("set.npz" if kind is npz else "set"), samples), tmp_path / "out/metrics.json"
    real = shards(tmp_path / "real", reference)
    result = evaluate(source, real, NETWORK, str(output), batch_size=batch_size, device="cpu")
    of_reference = first_pixels(reference)
    expected = frechet(first_pixels(samples), of_reference.mean(0), np.cov(of_reference, rowvar=False))
    assert result["metrics"] == {f"FD-{NETWORK}": pytest.approx(expected, rel=1e-6)}
    assert json.loads(output.read_text()) == result
    assert [path.name for path in output.parent.iterdir()] == ["metrics.json"]
    protocol, cropped = result["protocol"], {} if kind is npz else {"crop": "none"}
    hashed = [{"n": len(images), "sha256": set_sha256(image_digests(images))} for images in (samples, reference)]
    assert protocol["samples"] == {kind.__name__: source} | cropped | hashed[0]
    assert protocol["reference"] == {"shards": real, "crop": "none"} | hashed[1]
    assert protocol["image_size"] == [16, 16]
    network = {"name": NETWORK, "sha256": network_sha256(FirstPixels()), "dim": 6}
    assert protocol["features"] == network | {"resize": "whatever the class does"}
    assert f"FD-{NETWORK}" in (shown := capsys.readouterr().out)
    assert "31 samples, 26 reference images, 16x16" in shown


class Distance(torch.nn.Module):
    """In the place of LPIPS."""

    def forward(self, one, two):
        return (one - two).abs().mean((1, 2, 3))


def test_probe_and_reconstruction(tmp_path, monkeypatch):
    monkeypatch.setattr("dar_lightning.commands.evaluate.lpips_network", lambda path: FrozenNetwork(Distance()))
    train, real = shards(tmp_path / "train", pixels(40, 0)), shards(tmp_path / "val", pixels(20, 1))
    images, wrong = pixels(20, 2), np.arange(20) % 2
    wrong[:5] = 1 - wrong[:5]  # a quarter of the labels do not fit their picture
    samples = npz(tmp_path / "s.npz", images, labels=wrong)
    options = {"paired": True, "probe_train": train, "lpips": "vgg.pth", "batch_size": 3}
    result = evaluate(samples, real, "color_edges", str(tmp_path / "o.json"), **options)
    metrics = result["metrics"]
    assert (metrics["probe_accuracy_reference"], metrics["probe_accuracy_samples"]) == (1.0, 0.75)
    errors = images.astype(float) - pixels(20, 1)
    assert metrics["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / (errors**2).mean((1, 2, 3)))), rel=1e-5)
    assert 0 < metrics["ssim"] < 1
    assert metrics["lpips"] == pytest.approx(np.abs(errors / 127.5).mean(), rel=1e-5)
    assert result["protocol"]["reconstruction"]["lpips_sha256"] == network_sha256(Distance())


def test_identical_pairs_leave_valid_json(tmp_path):
    same = npz(tmp_path / "a.npz", pixels(12, 0))
    evaluate(same, same, NETWORK, str(tmp_path / "o.json"), paired=True)
    metrics = json.loads((tmp_path / "o.json").read_text(), parse_constant=pytest.fail)["metrics"]
    assert metrics == {f"FD-{NETWORK}": pytest.approx(0, abs=1e-6), "psnr": None, "ssim": pytest.approx(1)}


def test_memory_does_not_grow_with_the_npz(tmp_path):
    peaks = []
    for n in (64, 1024):
        path = npz(tmp_path / f"{n}.npz", pixels(n, 0, 64))
        tracemalloc.start()
        evaluate(path, path, NETWORK, str(tmp_path / "o.json"), batch_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20, "12 MB of images may not show"


def test_a_pipeline_draws_the_same_images_in_any_batches(tmp_path, pipeline):
    """What `dar evaluate` measures of them: tests/commands/test_evaluate.py."""
    drawn = {}
    for batch_size, seed in ((2, 7), (5, 7), (5, 8)):
        images = DrawnImages(DARPipeline.from_pretrained(pipeline), 6, seed, guidance=(1.0, 3.0))
        batches = list(images.batches(batch_size))
        drawn[batch_size, seed] = torch.cat([batch for batch, _ in batches])
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 3, 0, 1]
    same = drawn[5, 7]
    assert same.shape == (6, 3, SIZE, SIZE)
    assert torch.equal(drawn[2, 7], same), "to the bit: always as many rows in a forward pass"
    assert (same[0].int() - same[len(CLASSES)].int()).abs().float().mean() > 1, "same class, but another image"
    assert (drawn[5, 8].int() - same.int()).abs().float().mean() > 1, "another seed"

    reference = npz(tmp_path / "r.npz", pixels(8, 0, SIZE))
    with pytest.raises(UserError, match=r"--paired: .* is a pipeline"):
        evaluate(pipeline, reference, NETWORK, str(tmp_path / "o.json"), paired=True)


def test_the_shipped_pipeline_is_known_by_its_name(tmp_path):
    reference = npz(tmp_path / "r.npz", pixels(4, 0, 64))
    options = {"num_samples": 2, "num_steps": 1, "device": "cpu"}
    result = evaluate("fruit64", reference, NETWORK, str(tmp_path / "o.json"), **options)
    assert result["protocol"]["samples"]["pipeline"] == "fruit64"


def test_saved_statistics_stand_for_their_images(tmp_path):
    samples, reference = npz(tmp_path / "samples.npz", pixels(20, 0)), npz(tmp_path / "reference.npz", pixels(30, 1))
    file, output = str(tmp_path / "statistics.npz"), str(tmp_path / "o.json")
    by_images = evaluate(samples, reference, NETWORK, str(tmp_path / "images.json"), save_statistics=file)
    by_file = evaluate(samples, file, NETWORK, output)
    assert by_file["metrics"] == pytest.approx(by_images["metrics"], rel=1e-9)
    protocol = by_file["protocol"]["reference"]
    assert (protocol["npz"], protocol["n"], protocol["statistics"]) == (file, 30, "mu and sigma as stored")
    assert protocol["statistics_of"]["npz"] == reference
    compare(f"{output},{tmp_path}/images.json")
    refused(
        r"^--reference: .* holds statistics of features [0-9a-f]{12}; features",
        evaluate,
        samples,
        file,
        RED_GREEN,
        output,
    )
    for option in ("paired", "full"):
        refused(f"^--{option}: .* statistics only", evaluate, samples, file, NETWORK, output, **{option: True})


def test_statistics_as_adm_stores_them(tmp_path, monkeypatch):
    """ADM's reference batch has mu and sigma of all images, and 10,000 of these."""
    samples, output = npz(tmp_path / "samples.npz", pixels(20, 0)), str(tmp_path / "o.json")
    statistics = {"mu": np.linspace(0, 200, 6), "sigma": np.diag(np.linspace(1, 2, 6))}
    adm = npz(tmp_path / "VIRTUAL.npz", pixels(9, 3), **statistics, mu_s=np.zeros(23), sigma_s=np.eye(23))
    monkeypatch.setitem(features.BUILT_IN, "inception", lambda weights: FirstPixels())
    result = evaluate(samples, adm, "inception", output)
    assert result["metrics"] == {"FID": pytest.approx(frechet(first_pixels(pixels(20, 0)), **statistics), rel=1e-6)}
    reference = result["protocol"]["reference"]
    assert (reference["n"], reference["statistics"]) == (None, "mu and sigma as stored")
    pairs = npz(tmp_path / "nine.npz", pixels(9, 4))
    reference = evaluate(pairs, adm, "inception", output, paired=True)["protocol"]["reference"]
    assert reference["sha256"] == set_sha256(image_digests(pixels(9, 3))), "PSNR is of images"
    assert reference["statistics"] == "mu and sigma as stored"
    # any other network cannot use them, and measures the images instead
    reference = evaluate(samples, adm, NETWORK, output)["protocol"]["reference"]
    assert (reference["n"], "statistics" in reference) == (9, False)
    small = npz(tmp_path / "small.npz", pixels(9, 3), mu=np.zeros(5), sigma=np.eye(5))
    refused("statistics of 5 and of 6 features cannot be compared", evaluate, samples, small, "inception", output)
    with pytest.raises(UserError, match=r"--samples: images of 16x16, those of --reference have 8x8"):
        evaluate(samples, npz(tmp_path / "v.npz", pixels(9, 3, 8), **statistics), "inception", output)


ZEROS = np.zeros((4, 16, 16, 3), np.uint8)
WRONG_NPZ = [  # its arrays, and what the line says
    ({"arr_0": ZEROS[:0]}, "holds no images"),
    ({"arr_0": ZEROS[:1]}, r"1 image\(s\)"),
    ({"arr_0": ZEROS.astype(np.float32)}, "must be uint8 .* is float32"),
    ({"arr_0": ZEROS.transpose(0, 3, 1, 2)}, r"must be uint8 \(n, H, W, 3\)"),
    ({"arr_0": ZEROS[..., 0]}, r"must be uint8 \(n, H, W, 3\)"),
    ({"arr_0": np.zeros((4, 32, 32, 3), np.uint8)}, "images of 32x32, those of --reference have 16x16"),
    ({"arr_0": ZEROS, "labels": np.zeros(3, int)}, "labels of .* must be 4 integers"),
    ({"images": ZEROS}, "holds no arr_0"),
    ({"mu": np.zeros(3), "sigma": np.zeros((3, 2))}, "mu and sigma of .* must be a mean"),
    ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "finite and symmetric"),
]
MISTAKES = [
    *(
        ({"reference" if "mu" in arrays else "samples": f"wrong{number}.npz"}, f"^--(samples|reference): .*{says}")
        for number, (arrays, says) in enumerate(WRONG_NPZ)
    ),
    ({"samples": "damaged.npz"}, "^--samples: arr_0 of .* is damaged"),  # a wrong checksum
    ({"samples": "inflated.npz"}, "^--samples: arr_0 of .* is damaged"),  # and a stream that cannot be inflated
    ({"samples": "none"}, "^--samples: .* does not exist"),
    ({"reference": "empty"}, "^--reference: .* holds no images"),
    ({"reference": "broken.npz"}, "^--reference: .* not a readable npz"),
    ({"reference": "half.npz"}, "^--reference: .* not a readable npz"),
    ({"samples": "five.npz", "paired": True}, "^--paired: .* has 5 images"),
    ({"samples": "five.npz", "num_samples": 50}, "^--num_samples 50: .* has 5 images"),
    ({"samples": "twice.npz"}, "^--samples: has an image twice, numbers 4 and 7; "),
    ({"samples": "dark.npz"}, "^--samples: no value is above 1; "),
    ({"samples": "sizes"}, "^--samples: images of different sizes, 30x40 and 64x64.*--image_size"),
    ({"probe_train": "good.npz", "samples": "labelled.npz", "features": "not.loaded"}, "^--probe_train has no labels"),
    ({"probe_train": "labelled.npz", "features": "not.even.loaded"}, "^--samples has no labels"),
    ({"probe_train": "labelled.npz", "samples": "beyond.npz"}, "^--samples: has labels outside"),
    ({"lpips": "vgg.pth"}, "^--lpips vgg.pth: compares pairs; add --paired"),
    ({"features_weights": "w.pth"}, "^--features_weights w.pth: .* is a class"),
    ({"features": "no_such_network"}, "^--features no_such_network: not inception"),
    ({"features": NETWORK.replace("FirstPixels", "Images")}, "must give .* features, gave"),
    ({"output": "file/o.json"}, "^--output .* not a folder"),
    ({"output": "empty"}, "^--output .* is a folder"),
    ({"save_statistics": "empty"}, "^--save_statistics .*: is a folder"),
    ({"output": "good.json"}, "^--output .* is --samples or the record beside it"),
    ({"device": "tpu9"}, "device: tpu9"),
    ({"batch_size": 0}, "^batch_size is 0"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root, images = tmp_path_factory.mktemp("files"), pixels(8, 0)
    npz(root / "good.npz", images), npz(root / "five.npz", images[:5]), npz(root / "dark.npz", images % 2)
    npz(root / "labelled.npz", images, labels=np.arange(8) % 2), npz(root / "beyond.npz", images, labels=np.arange(8))
    npz(root / "twice.npz", images[[0, 1, 2, 3, 4, 5, 6, 4]])
    (root / "empty").mkdir()
    (root / "file").write_text("in the way")
    (root / "broken.npz").write_bytes(b"PK not a zip")
    (root / "half.npz").write_bytes((root / "good.npz").read_bytes()[:500])
    for number, (arrays, _) in enumerate(WRONG_NPZ):
        np.savez(root / f"wrong{number}.npz", **arrays)
    for name, save in (("damaged", np.savez), ("inflated", np.savez_compressed)):
        save(root / f"{name}.npz", arr_0=pixels(64, 0))
        content = bytearray((root / f"{name}.npz").read_bytes())
        content[5000:5400] = bytes(400)
        (root / f"{name}.npz").write_bytes(content)
    (root / "sizes").mkdir()
    for number, size in enumerate([(40, 30), (64, 64), (33, 90)]):
        Image.new("RGB", size, (200, 80 * number, 0)).save(root / f"sizes/{number}.jpg")
    return root


@pytest.mark.parametrize(("change", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_mistakes_are_one_line(change, says, files, monkeypatch):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    options = {"samples": "good.npz", "reference": "good.npz", "features": NETWORK, "output": "o.json"}
    refused(says, evaluate, **options | change)
    assert sorted(files.iterdir()) == before


def test_images_are_taken_as_they_are_wanted(files, tmp_path):
    good, output = f"{files}/good.npz", str(tmp_path / "o.json")
    evaluate(f"{files}/twice.npz", good, NETWORK, output, allow_duplicates=True, num_samples=8)
    protocol = evaluate(f"{files}/sizes", good, NETWORK, output, image_size=16)["protocol"]
    assert protocol["samples"]["crop"] == "ADM centre crop to 16"


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
