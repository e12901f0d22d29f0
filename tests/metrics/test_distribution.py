"""KID, precision and recall through torch-fidelity: numbers by their definitions, and their names."""

import numpy as np
import pytest
import torch
from refusals import refused

pytest.importorskip("torch_fidelity")

from dar_lightning.metrics import distribution


def measured(samples, reference) -> tuple[dict[str, float], dict[str, str]]:
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
