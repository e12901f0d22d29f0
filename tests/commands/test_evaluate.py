"""`dar evaluate`: real files in, a JSON with its protocol out, and one line for each mistake."""

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import NETWORK, FirstPixels, first_pixels, folder, frechet, npz, pixels, shards
from PIL import Image
from tiny_models import CLASSES, SIZE

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.errors import UserError
from dar_lightning.metrics import features
from dar_lightning.metrics.features import FrozenNetwork, network_sha256
from dar_lightning.metrics.images import DrawnImages
from dar_lightning.records.pixels import image_digests, set_sha256

RED_GREEN = NETWORK.replace("FirstPixels", "RedGreen")


@pytest.mark.parametrize(("kind", "batch_size"), [(npz, 7), (folder, 7), (shards, 64)])
def test_distance_from_every_source(tmp_path, kind, batch_size):
    samples, reference = pixels(31, 0), pixels(26, 1)
    source = kind(tmp_path / ("set.npz" if kind is npz else "set"), samples)
    output = tmp_path / "out" / "metrics.json"
    result = evaluate(
        source, npz(tmp_path / "ref.npz", reference), NETWORK, str(output), batch_size=batch_size, device="cpu"
    )
    of_reference = first_pixels(reference)
    expected = frechet(first_pixels(samples), of_reference.mean(0), np.cov(of_reference, rowvar=False))
    assert result["metrics"] == {f"FD-{NETWORK}": pytest.approx(expected, rel=1e-6)}
    assert json.loads(output.read_text()) == result
    assert [path.name for path in output.parent.iterdir()] == ["metrics.json"]


def test_protocol_says_what_was_measured(tmp_path, capsys):
    samples = npz(tmp_path / "a.npz", pixels(12, 0))
    reference = shards(tmp_path / "shards", pixels(14, 1))
    protocol = evaluate(samples, reference, "color_edges", str(tmp_path / "o.json"))["protocol"]
    assert protocol["samples"] == {"npz": samples, "n": 12, "sha256": set_sha256(image_digests(pixels(12, 0)))}
    hashed = {"n": 14, "sha256": set_sha256(image_digests(pixels(14, 1)))}
    assert protocol["reference"] == {"shards": reference, "crop": "none"} | hashed
    assert protocol["image_size"] == [16, 16]
    assert len(protocol["features"].pop("sha256")) == 64
    assert protocol["features"] == {"name": "color_edges", "dim": 180, "resize": "area to 32x32"}
    shown = capsys.readouterr().out
    assert "FD-color_edges" in shown
    assert "12 samples, 14 reference images, 16x16" in shown


def test_probe_and_reconstruction(tmp_path):
    train, real = shards(tmp_path / "train", pixels(40, 0)), shards(tmp_path / "val", pixels(20, 1))
    images, wrong = pixels(20, 2), np.arange(20) % 2
    wrong[:5] = 1 - wrong[:5]  # a quarter of the labels do not fit their picture
    samples = npz(tmp_path / "s.npz", images, labels=wrong)
    metrics = evaluate(samples, real, "color_edges", str(tmp_path / "o.json"), paired=True, probe_train=train)[
        "metrics"
    ]
    assert (metrics["probe_accuracy_reference"], metrics["probe_accuracy_samples"]) == (1.0, 0.75)
    errors = (images.astype(float) - pixels(20, 1)) ** 2
    assert metrics["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors.mean((1, 2, 3)))), rel=1e-5)
    assert 0 < metrics["ssim"] < 1


def test_identical_pairs_leave_valid_json(tmp_path):
    same = npz(tmp_path / "a.npz", pixels(12, 0))
    evaluate(same, same, NETWORK, str(tmp_path / "o.json"), paired=True)
    metrics = json.loads((tmp_path / "o.json").read_text(), parse_constant=pytest.fail)["metrics"]
    assert metrics == {f"FD-{NETWORK}": pytest.approx(0, abs=1e-6), "psnr": None, "ssim": pytest.approx(1)}


class Distance(torch.nn.Module):
    """In the place of LPIPS."""

    def forward(self, one, two):
        return (one - two).abs().mean((1, 2, 3))


def test_lpips_is_the_mean_over_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr("dar_lightning.commands.evaluate.lpips_network", lambda path: FrozenNetwork(Distance()))
    first, second = pixels(5, 0), pixels(5, 1)
    sets = npz(tmp_path / "a.npz", first), npz(tmp_path / "b.npz", second)
    result = evaluate(*sets, NETWORK, str(tmp_path / "o.json"), paired=True, lpips="vgg.pth", batch_size=2)
    assert result["metrics"]["lpips"] == pytest.approx(np.abs(first / 127.5 - second / 127.5).mean(), rel=1e-5)
    assert result["protocol"]["reconstruction"]["lpips_sha256"] == network_sha256(Distance())


def test_centre_crop_brings_photographs_to_one_size(tmp_path):
    (tmp_path / "mixed").mkdir()
    for number, size in enumerate([(40, 30), (64, 64), (33, 90)]):
        Image.new("RGB", size, (200, 80 * number, 0)).save(tmp_path / f"mixed/{number}.jpg")
    mixed, reference = str(tmp_path / "mixed"), npz(tmp_path / "r.npz", pixels(8, 0))
    with pytest.raises(UserError, match=r"--samples: images of different sizes, 30x40 and 64x64.*--image_size"):
        evaluate(mixed, npz(tmp_path / "r2.npz", pixels(8, 0, 30)[:, :, :30]), NETWORK, str(tmp_path / "o.json"))
    protocol = evaluate(mixed, reference, NETWORK, str(tmp_path / "o.json"), image_size=16)["protocol"]
    assert protocol["samples"]["crop"] == "ADM centre crop to 16"


def test_memory_does_not_grow_with_the_npz(tmp_path):
    peaks = []
    for n in (64, 1024):
        path = npz(tmp_path / f"{n}.npz", pixels(n, 0, 64))
        tracemalloc.start()
        evaluate(path, path, NETWORK, str(tmp_path / "o.json"), batch_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20, "12 MB of images may not show"


# ---- a pipeline's own samples


def test_a_pipeline_draws_the_same_images_in_any_batches(tmp_path, pipeline):
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

    reference, output = npz(tmp_path / "r.npz", pixels(8, 0, SIZE)), str(tmp_path / "o.json")
    options = {"num_samples": 6, "seed": 7, "guidance": (1.0, 3.0), "batch_size": 5}
    result = evaluate(pipeline, reference, NETWORK, output, device="cpu", **options)
    saved = npz(tmp_path / "s.npz", same.permute(0, 2, 3, 1).numpy())
    assert evaluate(saved, reference, NETWORK, str(tmp_path / "o2.json"))["metrics"] == result["metrics"]
    samples = json.loads(Path(output).read_text())["protocol"]["samples"]
    assert (samples["n"], samples["seed"], samples["guidance"], samples["steps"]) == (6, 7, [1.0, 3.0], 4)
    assert samples["ema"] == {"tokenizer": None, "ar": None}, "saved by hand, nobody noted it"
    with pytest.raises(UserError, match=r"--paired: .* is a pipeline"):
        evaluate(pipeline, reference, NETWORK, output, paired=True)


def test_the_shipped_pipeline_is_known_by_its_name(tmp_path):
    reference = npz(tmp_path / "r.npz", pixels(4, 0, 64))
    options = {"num_samples": 2, "num_steps": 1, "device": "cpu"}
    result = evaluate("fruit64", reference, NETWORK, str(tmp_path / "o.json"), **options)
    assert result["protocol"]["samples"]["pipeline"] == "fruit64"


# ---- stored statistics


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
    with pytest.raises(UserError, match=r"^--reference: .* holds statistics of features [0-9a-f]{12}; --features"):
        evaluate(samples, file, RED_GREEN, output)
    for option in ("paired", "full"):
        with pytest.raises(UserError, match=f"^--{option}: .* statistics only"):
            evaluate(samples, file, NETWORK, output, **{option: True})


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
    with pytest.raises(UserError, match="statistics of 5 and of 6 features cannot be compared"):
        evaluate(samples, small, "inception", output)
    with pytest.raises(UserError, match=r"--samples: images of 16x16, those of --reference have 8x8"):
        evaluate(samples, npz(tmp_path / "v.npz", pixels(9, 3, 8), **statistics), "inception", output)


# ---- mistakes: one line each, and nothing written

ZEROS = np.zeros((4, 16, 16, 3), np.uint8)
WRONG_NPZ = {
    "holds no images": {"arr_0": ZEROS[:0]},
    r"1 image\(s\)": {"arr_0": ZEROS[:1]},
    "must be uint8 .* is float32": {"arr_0": ZEROS.astype(np.float32)},
    r"must be uint8 \(n, H, W, 3\)": {"arr_0": ZEROS.transpose(0, 3, 1, 2)},
    r"must be uint8 \(n, H, W, 3\); is|values": {"arr_0": ZEROS[..., 0]},
    "images of 32x32, those of --reference have 16x16": {"arr_0": np.zeros((4, 32, 32, 3), np.uint8)},
    "labels of .* must be 4 integers": {"arr_0": ZEROS, "labels": np.zeros(3, int)},
    "holds no arr_0": {"images": ZEROS},
    "mu and sigma of .* must be a mean": {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
    "finite and symmetric": {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)},
}


@pytest.mark.parametrize("says", WRONG_NPZ)
def test_a_wrong_npz_is_one_line(tmp_path, says):
    np.savez(tmp_path / "bad.npz", **WRONG_NPZ[says])
    good, output = npz(tmp_path / "good.npz", pixels(8, 0)), tmp_path / "o.json"
    option = "reference" if "mu" in WRONG_NPZ[says] else "samples"
    with pytest.raises(UserError, match=f"^--{option}: .*{says}|^--{option}: {says}") as caught:
        evaluate(
            **{"samples": good, "reference": good, option: str(tmp_path / "bad.npz")},
            features=NETWORK,
            output=str(output),
        )
    assert "\n" not in str(caught.value)
    assert not output.exists()


MISTAKES = [
    ({"samples": "none"}, "^--samples: .* does not exist"),
    ({"reference": "empty"}, "^--reference: .* holds no images"),
    ({"reference": "broken.npz"}, "^--reference: .* not a readable npz"),
    ({"reference": "half.npz"}, "^--reference: .* not a readable npz"),
    ({"samples": "five.npz", "paired": True}, "^--paired: .* has 5 images"),
    ({"samples": "five.npz", "num_samples": 50}, r"^--num_samples 50: .* has 5 images"),
    ({"samples": "twice.npz"}, r"^--samples: has an image twice, numbers 4 and 7; "),
    ({"samples": "dark.npz"}, r"^--samples: no value is above 1; "),
    (
        {"probe_train": "good.npz", "samples": "labelled.npz", "features": "not.even.loaded"},
        "^--probe_train has no labels",
    ),
    ({"probe_train": "labelled.npz", "features": "not.even.loaded"}, "^--samples has no labels"),
    ({"probe_train": "labelled.npz", "samples": "beyond.npz"}, "^--samples: has labels outside"),
    ({"lpips": "vgg.pth"}, r"^--lpips vgg.pth: compares pairs; add --paired"),
    ({"features_weights": "w.pth"}, r"^--features_weights w.pth: .* is a class"),
    ({"features": "no_such_network"}, "^--features no_such_network: not inception"),
    ({"features": NETWORK.replace("FirstPixels", "Images")}, "must give .* features, gave"),
    ({"output": "file/o.json"}, "^--output .* not a folder"),
    ({"output": "empty"}, "^--output .* is a folder"),
    ({"save_statistics": "empty"}, "^--save_statistics .*: is a folder"),
    ({"output": "good.json"}, "^--output .* is --samples or the record beside it"),
    ({"device": "tpu9"}, "device: tpu9"),
    ({"batch_size": 0}, "^--batch_size 0"),
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
    return root


@pytest.mark.parametrize(("change", "says"), MISTAKES, ids=[says for _, says in MISTAKES])
def test_mistakes_are_one_line(change, says, files, monkeypatch):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    options = {"samples": "good.npz", "reference": "good.npz", "features": NETWORK, "output": "o.json"}
    with pytest.raises(UserError, match=says) as caught:
        evaluate(**options | change)
    assert "\n" not in str(caught.value)
    assert sorted(files.iterdir()) == before


def test_duplicates_are_taken_where_that_is_wanted(files, tmp_path):
    options = {"allow_duplicates": True, "num_samples": 8, "output": str(tmp_path / "o.json")}
    evaluate(f"{files}/twice.npz", f"{files}/good.npz", NETWORK, **options)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_inside_an_npz_is_one_line(save, tmp_path):
    """A wrong checksum, and a stream that cannot be inflated."""
    save(tmp_path / "x.npz", arr_0=pixels(64, 0))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[5000:5400] = bytes(400)
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"--samples: arr_0 of .* is damaged") as caught:
        evaluate(str(tmp_path / "x.npz"), npz(tmp_path / "g.npz", pixels(64, 0)), NETWORK, str(tmp_path / "o.json"))
    assert "\n" not in str(caught.value)


def test_the_command_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    npz(tmp_path / "a.npz", pixels(8, 0)), npz(tmp_path / "b.npz", pixels(9, 1, 32))
    words = ["evaluate", "--samples", "a.npz", "--features", NETWORK, "--output", "out/o.json", "--reference"]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "b.npz"])
    assert capsys.readouterr().err.splitlines()[-1] == (
        "dar evaluate: --samples: images of 16x16, those of --reference have 32x32; bring them to one size"
    )
    assert not Path("out").exists()
    main([*words, "a.npz"])
    metrics = json.loads(Path("out/o.json").read_text())["metrics"]
    assert metrics == {f"FD-{NETWORK}": pytest.approx(0, abs=1e-6)}
