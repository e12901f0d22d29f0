"""The linear probe against an independent solution of the same convex problem, and its accuracy on the fruit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dar_lightning.metrics.color_edges import ColorEdges
from dar_lightning.metrics.images import open_images
from dar_lightning.metrics.probe import LinearProbe

FRUIT = Path(__file__).parents[2] / "data" / "fruit64"


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centers = torch.tensor([[0.0, 0, 5], [3, 0, 5], [0, 30, 5]])  # the last feature is constant: it says nothing
    spread = torch.tensor([1.0, 10, 0])
    return centers[labels] + spread * torch.randn(n, 3, generator=generator), labels


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


def test_accuracy_counts_right_answers_and_chance_is_chance():
    probe = LinearProbe(*blobs(300, 0))
    features, labels = blobs(300, 1)
    accuracy = probe.accuracy(features, labels)
    assert accuracy == np.mean(probe(features).argmax(1).numpy() == labels.numpy())
    assert accuracy > 0.85
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert abs(probe.accuracy(features, shuffled) - 1 / 3) < 0.1


def test_deterministic():
    first, second = LinearProbe(*blobs(60, 0)), LinearProbe(*blobs(60, 0))
    assert torch.equal(first.weight, second.weight)


def features_of(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    network = ColorEdges()
    batches = [(network(images), labels) for images, labels in open_images(str(FRUIT / split), split, None).batches(64)]
    return torch.cat([features for features, _ in batches]), torch.cat([labels for _, labels in batches])


def test_color_edges_tell_fruit_apart():
    """Measured: 0.83 on real validation photos, of which no near duplicate was trained on; chance is 0.07."""
    probe = LinearProbe(*features_of("train"))
    assert probe.accuracy(*features_of("val")) > 0.75
    assert probe.weight.shape[0] == 14


@pytest.mark.parametrize("block", [2, 4])
def test_the_probe_bears_blur(block):
    probe = LinearProbe(*features_of("train"))
    network, right, total = ColorEdges(), 0, 0
    for images, labels in open_images(str(FRUIT / "val"), "val", None).batches(64):
        small = torch.nn.functional.avg_pool2d(images.float(), block)
        blurred = torch.nn.functional.interpolate(small, scale_factor=block, mode="bilinear").round().to(torch.uint8)
        right += (probe(network(blurred)).argmax(1) == labels).sum().item()
        total += len(labels)
    assert right / total > 0.65  # measured: 0.81 and 0.72
