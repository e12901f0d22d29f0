"""What `dar evaluate` refuses and takes from stored statistics, and which figures `dar compare` puts together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_vgg

from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.errors import UserError
from dar_lightning.metrics import features, statistics_file
from dar_lightning.records.pixels import image_digests, set_sha256
from dar_lightning.training.losses import PerceptualLoss


def pixels(n: int, seed: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def npz(path: Path, images: np.ndarray, **arrays) -> str:
    np.savez(path, arr_0=images, **arrays)
    return str(path)


class Means(torch.nn.Module):
    """Mean of each channel: (B, 3)."""

    def forward(self, images):
        return images.double().mean((2, 3))


class RedGreen(Means):
    """(B, 2)."""

    def forward(self, images):
        return super().forward(images)[:, :2]


NETWORK = f"{__name__}.Means"


@pytest.fixture
def sets(tmp_path) -> tuple[str, str]:
    return npz(tmp_path / "samples.npz", pixels(20, 0)), npz(tmp_path / "reference.npz", pixels(30, 1))


def test_saved_statistics_stand_for_their_images(sets, tmp_path):
    samples, reference = sets
    file, output = str(tmp_path / "statistics.npz"), str(tmp_path / "o.json")
    by_images = evaluate(samples, reference, NETWORK, output, save_statistics=file)
    by_file = evaluate(samples, file, NETWORK, output)
    assert by_file["metrics"] == pytest.approx(by_images["metrics"], rel=1e-9)
    protocol = by_file["protocol"]["reference"]
    assert (protocol["npz"], protocol["n"]) == (file, 30)
    assert protocol["statistics"] == "mu and sigma as stored"
    assert protocol["statistics_of"]["npz"] == reference
    with pytest.raises(UserError, match=r"^--reference: .* holds statistics of features [0-9a-f]{12}; --features"):
        evaluate(samples, file, f"{__name__}.RedGreen", output)
    for option in ("paired", "full"):
        with pytest.raises(UserError, match=f"^--{option}: .* statistics only"):
            evaluate(samples, file, NETWORK, output, **{option: True})


class Inception(Means):
    """In the place of Inception, whose name decides: 12 features."""

    def forward(self, images):
        return super().forward(images).repeat(1, 4)


def test_statistics_as_adm_stores_them(sets, tmp_path, monkeypatch):
    """ADM's reference batch has mu and sigma of all images, and 10,000 of these."""
    samples, _ = sets
    mu, sigma = np.linspace(0, 200, 12), np.diag(np.linspace(1, 2, 12))
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    adm = npz(tmp_path / "VIRTUAL.npz", pixels(9, 3), mu=mu, sigma=sigma, **spatial)
    monkeypatch.setitem(features.BUILT_IN, "inception", lambda weights: Inception())
    output = str(tmp_path / "o.json")
    result = evaluate(samples, adm, "inception", output)
    found = pixels(20, 0).astype(float).mean((1, 2))[:, np.arange(12) % 3]
    cov, root = np.cov(found, rowvar=False), np.diag(np.sqrt(np.diag(sigma)))
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov @ root).clip(0)).sum()  # sigma is diagonal
    expected = np.square(found.mean(0) - mu).sum() + np.trace(cov) + np.trace(sigma) - 2 * cross
    assert result["metrics"] == {"FID": pytest.approx(expected, rel=1e-6)}
    reference = result["protocol"]["reference"]
    assert (reference["n"], reference["statistics"]) == (None, "mu and sigma as stored")
    pairs = npz(tmp_path / "nine.npz", pixels(9, 4))
    reference = evaluate(pairs, adm, "inception", output, paired=True)["protocol"]["reference"]
    assert reference["sha256"] == set_sha256(image_digests(pixels(9, 3))), "PSNR is of images"
    assert reference["statistics"] == "mu and sigma as stored"
    # any other network cannot use them, and measures the images instead
    result = evaluate(samples, adm, NETWORK, output)
    assert result["protocol"]["reference"]["n"] == 9
    assert "statistics" not in result["protocol"]["reference"]
    small = npz(tmp_path / "small.npz", pixels(9, 3), mu=mu[:5], sigma=sigma[:5, :5])
    with pytest.raises(UserError, match="statistics of 5 and of 12 features cannot be compared"):
        evaluate(samples, small, "inception", output)
    with pytest.raises(UserError, match=r"--samples: images of 16x16, those of --reference have 8x8"):
        evaluate(samples, npz(tmp_path / "v.npz", pixels(9, 3, 8), mu=mu, sigma=sigma), "inception", output)


def test_broken_statistics_are_one_line(tmp_path):
    for arrays in (
        {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
        {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)},
    ):
        np.savez(tmp_path / "s.npz", **arrays)
        with pytest.raises(UserError, match=r"^--reference: mu and sigma of .* must be a mean"):
            statistics_file.read_statistics(str(tmp_path / "s.npz"), "--reference")


def test_refusals(sets, tmp_path):
    samples, reference = sets
    output = tmp_path / "o.json"
    twice = pixels(20, 0)
    twice[17] = twice[4]
    mistakes = [
        ({"samples": npz(tmp_path / "twice.npz", twice)}, r"^--samples: has an image twice, numbers 4 and 17; "),
        ({"samples": npz(tmp_path / "dark.npz", pixels(20, 0) % 2)}, r"^--samples: no value is above 1; "),
        ({"num_samples": 50}, r"^--num_samples 50: .* has 20 images"),
        ({"lpips": "vgg.pth"}, r"^--lpips vgg.pth: compares pairs; add --paired"),
        ({"features_weights": "w.pth"}, r"^--features_weights w.pth: .* is a class"),
        ({"save_statistics": str(tmp_path)}, r"^--save_statistics .*: is a folder"),
    ]
    for change, says in mistakes:
        with pytest.raises(UserError, match=says) as caught:
            evaluate(
                **{"samples": samples, "reference": reference, "features": NETWORK, "output": str(output)} | change
            )
        assert "\n" not in str(caught.value)
        assert not output.exists()
    evaluate(str(tmp_path / "twice.npz"), reference, NETWORK, str(output), allow_duplicates=True, num_samples=20)
    assert output.exists()


def test_lpips_is_the_mean_over_pairs(tmp_path):
    first, second = pixels(5, 0, 32), pixels(5, 1, 32)
    vgg = write_vgg(tmp_path / "vgg.pth")
    sets = npz(tmp_path / "a.npz", first), npz(tmp_path / "b.npz", second)
    found = evaluate(*sets, NETWORK, str(tmp_path / "o.json"), paired=True, lpips=str(vgg), batch_size=2)["metrics"]
    network = PerceptualLoss(weights_path=str(vgg)).distance.network
    pair = [torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1 for images in (first, second)]
    one_by_one = [network(a[None], b[None]).item() for a, b in zip(*pair, strict=True)]
    assert found["lpips"] == pytest.approx(np.mean(one_by_one), rel=1e-5)


def test_compare(sets, tmp_path, capsys):
    samples, reference = sets
    other = npz(tmp_path / "other.npz", pixels(20, 7))
    moved = npz(tmp_path / "moved.npz", pixels(30, 1))
    shorter = npz(tmp_path / "shorter.npz", pixels(19, 7))

    def run(name: str, *arguments, **options) -> str:
        evaluate(*arguments, str(tmp_path / name), **options)
        return str(tmp_path / name)

    one = run("one.json", samples, reference, NETWORK)
    two = run("two.json", other, moved, NETWORK, batch_size=7)
    capsys.readouterr()
    compare(f"{one}, {two}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == [f"FD-{NETWORK}"]
    for line, name in zip(lines[1:], (one, two), strict=True):
        value = json.loads(Path(name).read_text())["metrics"][f"FD-{NETWORK}"]
        assert line.split() == [name, f"{value:.4f}"]

    for wrong, says in [
        (run("net.json", other, reference, f"{__name__}.RedGreen"), r"differ in features\.dim: 3, 2"),
        (run("n.json", shorter, reference, NETWORK), r"differ in samples\.n: 20, 19"),
        (run("reference.json", samples, other, NETWORK), r"differ in reference\.n: 30, 20"),
        (str(tmp_path / "none.json"), "none.json cannot be read"),
        (samples, "cannot be read"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            compare(f"{one},{wrong}")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give two or more"):
        compare(one)
