"""`dar evaluate`: real files in, a JSON with its protocol out, and one line for each mistake."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.data.shards import Shard, ShardIndex, write_shard
from dar_lightning.errors import UserError
from dar_lightning.metrics.images import DrawnImages

FRUIT = Path(__file__).parents[2] / "data" / "fruit64"


def pixels(n: int, seed: int, size: int = 16) -> np.ndarray:
    """(n, size, size, 3) uint8: class i mod 2, the first reddish and the second greenish."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 80, (n, size, size, 3), dtype=np.uint8)
    images[np.arange(n), :, :, np.arange(n) % 2] += 150
    return images


def npz(path: Path, images: np.ndarray, **arrays) -> str:
    np.savez(path, arr_0=images, **arrays)
    return str(path)


def folder(path: Path, images: np.ndarray) -> str:
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:05d}.png")
    return str(path)


def shards(path: Path, images: np.ndarray) -> str:
    samples = []
    for number, image in enumerate(images):
        file = path.parent / "one.png"
        Image.fromarray(image).save(file)
        samples.append((f"{number:05d}", {"png": file.read_bytes(), "cls": str(number % 2).encode()}))
    entries: list[Shard] = [
        write_shard(path / f"{part:06d}.tar", samples[part * 10 : (part + 1) * 10])
        for part in range((len(samples) + 9) // 10)
    ]
    ShardIndex(path, tuple(entries), ("red", "green")).save()
    return str(path)


class FirstPixels(torch.nn.Module):
    """A feature network whose Frechet distance is easy to compute by hand."""

    def forward(self, images):
        return images[:, :, 0, :2].float().flatten(1)


NETWORK = f"{__name__}.FirstPixels"


def numpy_distance(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.linalg import sqrtm

    one, two = (
        images[:, 0, :2].transpose(0, 2, 1).reshape(len(images), -1).astype(float) for images in (first, second)
    )
    cov1, cov2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    return np.square(one.mean(0) - two.mean(0)).sum() + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real)


@pytest.mark.parametrize("kind", [npz, folder, shards])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_distance_from_every_source(tmp_path, kind, batch_size):
    samples, reference = pixels(31, 0), pixels(26, 1)
    source = kind(tmp_path / ("set.npz" if kind is npz else "set"), samples)
    output = tmp_path / "out" / "figures.json"
    result = evaluate(
        source, npz(tmp_path / "ref.npz", reference), NETWORK, str(output), batch_size=batch_size, device="cpu"
    )
    assert result["metrics"] == {f"FD-{NETWORK}": pytest.approx(numpy_distance(samples, reference), rel=1e-6)}
    assert json.loads(output.read_text()) == result
    assert [path.name for path in output.parent.iterdir()] == ["figures.json"]


def test_protocol_says_what_was_measured(tmp_path, capsys):
    samples = npz(tmp_path / "a.npz", pixels(12, 0))
    reference = shards(tmp_path / "shards", pixels(14, 1))
    protocol = evaluate(samples, reference, "color_edges", str(tmp_path / "o.json"))["protocol"]
    hashes = [protocol[name].pop("sha256") for name in ("samples", "reference")]
    assert len({*hashes}) == 2
    assert protocol["samples"] == {"npz": samples, "n": 12}
    assert protocol["reference"] == {"shards": reference, "crop": "none", "n": 14}
    assert protocol["image_size"] == [16, 16]
    assert protocol["features"] | {"sha256": ""} == {
        "name": "color_edges",
        "sha256": "",
        "dim": 180,
        "resize": "area to 32x32",
    }
    assert len(protocol["features"]["sha256"]) == 64
    assert protocol["provenance"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    shown = capsys.readouterr().out
    assert "FD-color_edges" in shown
    assert "12 samples, 14 reference images, 16x16" in shown


def test_probe_and_reconstruction(tmp_path):
    train, real = shards(tmp_path / "train", pixels(40, 0)), shards(tmp_path / "val", pixels(20, 1))
    images = pixels(20, 2)
    wrong = np.arange(20) % 2
    wrong[:5] = 1 - wrong[:5]  # a quarter of the labels do not fit their picture
    samples = npz(tmp_path / "s.npz", images, labels=wrong)
    metrics = evaluate(samples, real, "color_edges", str(tmp_path / "o.json"), paired=True, probe_train=train)[
        "metrics"
    ]
    assert metrics["probe_accuracy_reference"] == 1.0
    assert metrics["probe_accuracy_samples"] == 0.75
    errors = (images.astype(float) - pixels(20, 1)) ** 2
    assert metrics["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors.mean((1, 2, 3)))), rel=1e-5)
    assert 0 < metrics["ssim"] < 1


def test_identical_pairs_leave_valid_json(tmp_path):
    same = npz(tmp_path / "a.npz", pixels(12, 0))
    evaluate(same, same, "color_edges", str(tmp_path / "o.json"), paired=True)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    metrics = json.loads((tmp_path / "o.json").read_text(), parse_constant=refuse)["metrics"]
    assert metrics == {"FD-color_edges": pytest.approx(0, abs=1e-6), "psnr": None, "ssim": pytest.approx(1)}


def test_centre_crop_brings_photographs_to_one_size(tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, size in enumerate([(40, 30), (64, 64), (33, 90)]):
        Image.new("RGB", size, (200, 80 * number, 0)).save(mixed / f"{number}.jpg")
    reference = npz(tmp_path / "r.npz", pixels(8, 0))
    with pytest.raises(UserError, match=r"--samples: images of different sizes, 30x40 and 64x64.*--image_size"):
        evaluate(str(mixed), npz(tmp_path / "r2.npz", pixels(8, 0, 30)[:, :, :30]), NETWORK, str(tmp_path / "o.json"))
    protocol = evaluate(str(mixed), reference, NETWORK, str(tmp_path / "o.json"), image_size=16)["protocol"]
    assert protocol["samples"]["crop"] == "ADM centre crop to 16"


def test_real_fruit(tmp_path):
    """Real training photos against real validation photos: how near any generator could hope to come."""
    metrics = evaluate(
        str(FRUIT / "val"),
        str(FRUIT / "val"),
        "color_edges",
        str(tmp_path / "o.json"),
        probe_train=str(FRUIT / "train"),
    )["metrics"]
    assert metrics["FD-color_edges"] == pytest.approx(0, abs=1e-6)
    assert metrics["probe_accuracy_samples"] == metrics["probe_accuracy_reference"] > 0.75


def test_memory_does_not_grow_with_the_npz(tmp_path):
    random = np.random.default_rng(0)
    peaks = []
    for n in (64, 1024):
        path = npz(tmp_path / f"{n}.npz", random.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8))
        tracemalloc.start()
        evaluate(path, path, NETWORK, str(tmp_path / "o.json"), batch_size=16)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2**20, "12 MB of images may not show"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = SequentialDiffusionTokenizer(TokenizerConfig.preset("tiny")).eval()
    ar = ARModel(ARConfig.preset("tiny", num_classes=3)).eval()
    for model in (tokenizer, ar):  # parts that start at zero would draw every image alike
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("models") / "pipeline"
    DARPipeline(tokenizer, ar).save_pretrained(path)
    return str(path)


def test_pipeline_draws_the_same_images_in_any_batches(tmp_path, pipeline):
    drawn = {}
    for batch_size in (2, 5):
        images = DrawnImages(DARPipeline.from_pretrained(pipeline), 5, seed=7, guidance=(1.0, 3.0))
        batches = list(images.batches(batch_size))
        drawn[batch_size] = torch.cat([batch for batch, _ in batches])
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2, 0, 1]
    assert drawn[2].shape == (5, 3, 64, 64)
    assert torch.equal(drawn[2], drawn[5]), "to the bit: always as many rows in a forward pass"
    assert (drawn[2][0].int() - drawn[2][3].int()).abs().float().mean() > 1, "same class, but another image"
    other = DrawnImages(DARPipeline.from_pretrained(pipeline), 5, seed=8, guidance=(1.0, 3.0))
    assert (next(other.batches(5))[0].int() - drawn[5].int()).abs().float().mean() > 1, "another seed"

    reference = npz(tmp_path / "r.npz", pixels(8, 0, 64))
    arguments = {"features": NETWORK, "num_samples": 5, "seed": 7, "guidance": (1.0, 3.0), "batch_size": 5}
    result = evaluate(pipeline, reference, output=str(tmp_path / "o.json"), device="cpu", **arguments)
    saved = npz(tmp_path / "s.npz", drawn[5].permute(0, 2, 3, 1).numpy())
    again = evaluate(saved, reference, NETWORK, str(tmp_path / "o2.json"))
    assert result["metrics"] == again["metrics"]
    protocol = json.loads((tmp_path / "o.json").read_text())["protocol"]["samples"]
    assert (protocol["n"], protocol["seed"], protocol["guidance"], protocol["steps"]) == (5, 7, [1.0, 3.0], 4)
    assert protocol["ema"] == {"tokenizer": None, "ar": None}, "saved by hand, nobody noted it"
    with pytest.raises(UserError, match=r"--paired: .* is a pipeline"):
        evaluate(pipeline, reference, NETWORK, str(tmp_path / "o.json"), paired=True)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((0, 16, 16, 3), np.uint8)}, "holds no images"),
        ({"arr_0": np.zeros((1, 16, 16, 3), np.uint8)}, r"1 image\(s\)"),
        ({"arr_0": np.zeros((4, 16, 16, 3), np.float32)}, "must be uint8 .* is float32"),
        ({"arr_0": np.zeros((4, 3, 16, 16), np.uint8)}, r"must be uint8 \(n, H, W, 3\)"),
        ({"arr_0": np.zeros((4, 16, 16), np.uint8)}, r"must be uint8 \(n, H, W, 3\)"),
        ({"arr_0": np.zeros((4, 32, 32, 3), np.uint8)}, "images of 32x32, those of --reference have 16x16"),
        ({"arr_0": np.zeros((4, 16, 16, 3), np.uint8), "labels": np.zeros(3, int)}, "labels of .* must be 4 integers"),
        ({"images": np.zeros((4, 16, 16, 3), np.uint8)}, "holds no arr_0"),
    ],
)
def test_a_wrong_npz_is_one_line(tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    reference, output = npz(tmp_path / "ref.npz", pixels(8, 0)), tmp_path / "o.json"
    with pytest.raises(UserError, match=f"^--samples: .*{says}") as caught:
        evaluate(str(tmp_path / "bad.npz"), reference, NETWORK, str(output))
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_other_mistakes_are_one_line(tmp_path):
    good, labelled = (
        npz(tmp_path / "g.npz", pixels(8, 0)),
        npz(tmp_path / "l.npz", pixels(8, 0), labels=np.arange(8) % 2),
    )
    beyond = npz(tmp_path / "b.npz", pixels(8, 0), labels=np.arange(8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK not a zip")
    (tmp_path / "file").write_text("in the way")
    half = Path(good).read_bytes()[:500]
    (tmp_path / "half.npz").write_bytes(half)
    mistakes = [
        ({"samples": str(tmp_path / "none")}, "--samples: .* does not exist"),
        ({"reference": str(tmp_path / "empty")}, "--reference: .* holds no images"),
        ({"reference": str(tmp_path / "broken.npz")}, "--reference: .* not a readable npz"),
        ({"reference": str(tmp_path / "half.npz")}, "--reference: .* not a readable npz"),
        ({"samples": npz(tmp_path / "n.npz", pixels(5, 0)), "paired": True}, "--paired: .* has 5 images"),
        ({"probe_train": good, "samples": labelled}, "--probe_train has no labels"),
        ({"probe_train": labelled}, "--samples has no labels"),
        ({"probe_train": labelled, "samples": beyond}, "--samples: has labels outside"),
        ({"features": "no_such_network"}, "--features no_such_network: not inception"),
        ({"features": f"{__name__}.Images"}, "must give .* features, gave"),
        ({"output": str(tmp_path / "file" / "o.json")}, "--output .* cannot|--output .* not a folder"),
        ({"output": str(tmp_path / "empty")}, "--output .* is a folder"),
        ({"output": good.removesuffix("npz") + "json"}, "--output .* is --samples or the record beside it"),
        ({"device": "tpu9"}, "device: tpu9"),
        ({"batch_size": 0}, "--batch_size 0"),
    ]
    for change, says in mistakes:
        arguments = {
            "samples": good,
            "reference": good,
            "features": NETWORK,
            "output": str(tmp_path / "o.json"),
        } | change
        with pytest.raises(UserError, match=says) as caught:
            evaluate(**arguments)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "o.json").exists()


def test_missing_probe_labels_are_found_before_the_work(tmp_path):
    good, labelled = npz(tmp_path / "g.npz", pixels(8, 0)), npz(tmp_path / "l.npz", pixels(8, 0), labels=np.arange(8))
    options = {"reference": good, "features": "a.network.that.is.not.even.loaded", "output": str(tmp_path / "o.json")}
    with pytest.raises(UserError, match="--probe_train has no labels"):
        evaluate(samples=labelled, probe_train=good, **options)
    with pytest.raises(UserError, match="--samples has no labels"):
        evaluate(samples=good, probe_train=labelled, **options)


def test_damage_inside_an_npz_is_one_line(tmp_path):
    good = npz(tmp_path / "g.npz", pixels(64, 0))
    np.savez_compressed(tmp_path / "z.npz", arr_0=pixels(64, 0))
    for name in ("g.npz", "z.npz"):  # a wrong checksum, and a stream that cannot be inflated
        content = bytearray((tmp_path / name).read_bytes())
        content[5000:5400] = bytes(400)
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"--samples: arr_0 of .* is damaged") as caught:
            evaluate(str(tmp_path / "damaged.npz"), good, NETWORK, str(tmp_path / "o.json"))
        assert "\n" not in str(caught.value)


class Images(torch.nn.Module):
    """Not features: it returns what it is given."""

    def forward(self, images):
        return images


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    (tmp_path / "my_net.py").write_text(
        "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x):\n        return x.float().mean((2, 3))\n"
    )
    npz(tmp_path / "a.npz", pixels(8, 0))
    npz(tmp_path / "b.npz", pixels(9, 1, 32))

    def dar(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "dar_lightning", "evaluate", *options, "--output", "out/o.json"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    wrong = dar("--samples", "a.npz", "--reference", "b.npz", "--features", "my_net.Mean")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == (
        "dar evaluate: --samples: images of 16x16, those of --reference have 32x32; bring them to one size"
    )
    assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "out").exists()

    right = dar("--samples", "a.npz", "--reference", "a.npz", "--features", "my_net.Mean")
    assert right.returncode == 0, right.stderr
    metrics = json.loads((tmp_path / "out" / "o.json").read_text())["metrics"]
    assert metrics == {"FD-my_net.Mean": pytest.approx(0, abs=1e-6)}


def test_the_shipped_pipeline_is_known_by_its_name(tmp_path):
    reference = npz(tmp_path / "r.npz", pixels(4, 0, 64))
    result = evaluate("fruit64", reference, NETWORK, str(tmp_path / "o.json"), num_samples=2, device="cpu")
    assert result["protocol"]["samples"]["pipeline"] == "fruit64"
