"""The Frechet distance against closed forms, scipy's matrix root and torch-fidelity; and other metrics of features."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from refusals import refused
from scipy.optimize import minimize

from dar_lightning.metrics import distribution
from dar_lightning.metrics.color_edges import ColorEdges
from dar_lightning.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from dar_lightning.metrics.images import open_images
from dar_lightning.metrics.probe import LinearProbe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def gaussian_of(features: torch.Tensor, batch_size: int = 7) -> Gaussian:
    statistics = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics.compute()


def correlated(n: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + seed


def test_closed_forms():
    # Covariances that share eigenvectors: |mu1 - mu2|^2 + sum (s1 - s2)^2 over standard deviations s.
    rotation, _ = torch.linalg.qr(correlated(5, 5, 1))
    stds = torch.tensor([[1.0, 2.0, 0.5, 3.0, 0.0], [2.0, 2.0, 1.5, 0.0, 4.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 3.0, 4.0]], dtype=torch.float64)
    covariances = [rotation @ std.square().diag() @ rotation.T for std in stds]
    one, two = (Gaussian(*both, None) for both in zip(means, covariances, strict=True))
    assert frechet_distance(one, two) == pytest.approx(1 + 4 + (stds[0] - stds[1]).square().sum().item(), abs=1e-9)
    same = gaussian_of(torch.ones(3, 4)), gaussian_of(torch.full((5, 4), 3.0))  # one image repeated: no covariance
    assert frechet_distance(*same) == pytest.approx(4 * 2**2)


@pytest.mark.parametrize("n", [400, 30], ids=["full rank", "fewer samples than dimensions"])
def test_against_scipy_and_torch_fidelity(n):
    first, second = correlated(n, 40, 1), correlated(n + 10, 40, 2)
    one, two = gaussian_of(first), gaussian_of(second)
    distance = frechet_distance(one, two)
    mean = (first.mean(0) - second.mean(0)).numpy()
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    expected = mean @ mean + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(scipy.linalg.sqrtm(cov1 @ cov2)).real
    # scipy's root of a singular product is itself only good to about 1e-6 of the trace.
    assert distance == pytest.approx(expected, rel=1e-9 if n == 400 else 1e-5)
    assert frechet_distance(two, one) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    padded = [torch.cat([features, torch.zeros(len(features), 24)], dim=1) for features in (first, second)]
    assert frechet_distance(*map(gaussian_of, padded)) == pytest.approx(distance, rel=1e-9), "features that are zero"
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    theirs = fid.fid_statistics_to_metric(*map(fid.fid_features_to_statistics, (first, second)), verbose=False)
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_the_root_is_as_fast_as_was_asked_for():
    """At least four times as fast as scipy's at 2048 dimensions, to 1e-6, in the committed measurement."""
    measured = json.loads((BENCHMARKS / "results" / "frechet.json").read_text())
    assert {(row["samples"] > 2048, row["dim"]) for row in measured["rows"]} == {(True, 2048), (False, 2048)}
    assert all(row["ratio"] >= 4 and row["relative_difference"] < 1e-6 for row in measured["rows"])
    now = runpy.run_path(str(BENCHMARKS / "frechet.py"))["measure"](count=500, dim=64, repetitions=1)
    assert now["relative_difference"] < 1e-6


def test_statistics_do_not_depend_on_batches_and_match_numpy():
    features = (correlated(100, 6, 4) * 0.01 + 50).float()
    whole, batched = gaussian_of(features, 100), gaussian_of(features, 3)
    torch.testing.assert_close(whole.covariance, batched.covariance, rtol=1e-8, atol=1e-10)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(batched.covariance, expected, rtol=1e-7, atol=1e-9)
    assert (batched.count, batched.mean.dtype) == (100, torch.float64)
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_of(features[:1])


def measured(samples, reference) -> tuple[dict[str, float], dict[str, str]]:
    pytest.importorskip("torch_fidelity")
    network = torch.nn.Identity()
    return distribution.distribution_metrics(samples, reference, "net", network, torch.device("cpu"))


def two_modes(n: int, seed: int) -> torch.Tensor:
    points = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    points[n // 2 :] += 100
    return points


def test_precision_and_recall_by_their_definition():
    samples, reference = two_modes(30, 2)[:20].numpy(), (two_modes(41, 3) * 1.5).numpy()

    def covered(points, balls) -> float:
        apart = np.linalg.norm(balls[:, None] - balls[None], axis=-1)
        radius = np.sort(apart, axis=1)[:, 3]  # the nearest is the point itself
        return np.mean((np.linalg.norm(points[:, None] - balls[None], axis=-1) <= radius).any(axis=1))

    found, _ = measured(torch.from_numpy(samples), torch.from_numpy(reference))
    assert found["precision-net"] == pytest.approx(covered(samples, reference), abs=1e-6)
    assert found["recall-net"] == pytest.approx(covered(reference, samples), abs=1e-6)
    assert found["precision-net"] != found["recall-net"]


def test_kernel_distance_by_its_definition(monkeypatch):
    x, y = two_modes(12, 4).double().numpy() / 50, two_modes(12, 5).double().numpy() / 40  # one subset: all of them

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    off = ~np.eye(12, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    found, protocol = measured(torch.from_numpy(x), torch.from_numpy(y))
    assert found["KD-net"] == pytest.approx(expected, rel=1e-6)
    assert "mean over 100 subsets of 12" in protocol["kernel_distance"]
    assert "KD-net_std" not in found, "a hundred times the same subset"
    monkeypatch.setattr(distribution, "SUBSET_SIZE", 20)
    found, protocol = measured(two_modes(30, 6) / 50, two_modes(40, 7) / 50)
    assert found["KD-net_std"] > 0
    assert "mean and std over 100 subsets of 20" in protocol["kernel_distance"]


def test_too_few_images_are_one_line():
    refused("--full: 3 images on a side", lambda: measured(two_modes(3, 0), two_modes(9, 0)))


FRUIT = Path(__file__).parents[2] / "data" / "fruit64"


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centers = torch.tensor([[0.0, 0, 5], [3, 0, 5], [0, 30, 5]])  # the last feature is constant: it says nothing
    return centers[labels] + torch.tensor([1.0, 10, 0]) * torch.randn(n, 3, generator=generator), labels


def test_solves_the_stated_problem():
    features, labels = blobs(90, 0)
    x = features[:, :2].double().numpy()
    x = (x - x.mean(0)) / x.std(0, ddof=1)
    y = np.eye(3)[labels.numpy()]

    def objective(flat):
        weight, bias = flat[:6].reshape(3, 2), flat[6:]
        logits = x @ weight.T + bias
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(y * log_p).sum(1).mean() + 0.05 / 2 * (weight**2).sum()

    expected = minimize(objective, np.zeros(9), method="BFGS", options={"gtol": 1e-8}).x
    probe = LinearProbe(features, labels, l2=0.05)
    np.testing.assert_allclose(probe.weight[:, :2].numpy(), expected[:6].reshape(3, 2), atol=1e-4)
    assert probe.weight[:, 2].abs().max() == 0
    assert torch.equal(probe.weight, LinearProbe(features, labels, l2=0.05).weight)
    features, labels = blobs(300, 1)
    accuracy = probe.accuracy(features, labels)
    assert accuracy == np.mean(probe(features).argmax(1).numpy() == labels.numpy())
    assert accuracy > 0.85


def test_color_edges_tell_fruit_apart_and_bear_blur():
    """Measured: 0.83 on real validation photos, 0.72 blurred in 4x4 blocks; chance is 0.07."""
    network, sets = ColorEdges(), {}
    for split in ("train", "val"):
        images, labels = zip(*open_images(str(FRUIT / split), split, None).batches(64), strict=True)
        sets[split] = torch.cat(images), torch.cat(labels)
    probe = LinearProbe(network(sets["train"][0]), sets["train"][1])
    images, labels = sets["val"]
    assert probe.accuracy(network(images), labels) > 0.75
    small = torch.nn.functional.avg_pool2d(images.float(), 4)
    blurred = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear").round().to(torch.uint8)
    assert probe.accuracy(network(blurred), labels) > 0.65
    assert probe.num_classes == 14
