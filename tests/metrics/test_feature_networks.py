"""Feature networks: what color_edges measures, how networks are found by name, and what a wrong name says."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from dar_lightning.errors import UserError
from dar_lightning.metrics.color_edges import ColorEdges
from dar_lightning.metrics.features import fingerprint, frechet_name, load_features


def plain(color: tuple[int, int, int], size: int = 64) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, size, size)


def test_color_edges_of_a_plain_image():
    features = ColorEdges()(plain((255, 0, 0)))[0]
    assert features.shape == (180,)
    assert features.dtype == torch.float32
    red = np.array([1 / np.sqrt(3), 1 / np.sqrt(2), 1 / np.sqrt(6)])  # lightness, red - green, yellow - blue
    np.testing.assert_allclose(features[:12].view(3, 4), np.repeat(red[:, None], 4, 1), rtol=1e-5)
    for histogram in (features[12:76], features[76:84], features[84:148], features[148:156]):
        assert histogram.square().sum() == pytest.approx(1, abs=1e-5)
        assert (histogram > 0).sum() <= 4
    assert features[156:].abs().max() < 1e-3  # no edges


@pytest.mark.parametrize(("transpose", "strongest"), [(False, 0), (True, 2)], ids=["vertical bars", "horizontal bars"])
def test_color_edges_know_directions(transpose, strongest):
    bars = (torch.arange(64) // 16 % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64)
    features = ColorEdges()(bars.transpose(2, 3) if transpose else bars)[0]
    lightness = features[156:168].view(3, 4)[0]
    assert lightness.argmax() == strongest
    assert lightness[(strongest + 2) % 4] < 1e-3


@pytest.mark.parametrize("size", [16, 32, 64, 256, 40])
def test_color_edges_mean_the_same_at_any_size(size):
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255, size=size, mode="bilinear"
    ).to(torch.uint8)
    large = torch.nn.functional.interpolate(
        torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255, size=64, mode="bilinear"
    ).to(torch.uint8)
    distance = (ColorEdges()(image) - ColorEdges()(large)).norm()
    assert distance < 0.2 * ColorEdges()(large).norm()


def test_color_edges_are_per_image():
    images = torch.randint(0, 256, (5, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    network = ColorEdges()
    torch.testing.assert_close(network(images)[3:4], network(images[3:4]))


def test_only_inception_is_called_fid():
    assert frechet_name("inception") == "FID"
    assert frechet_name("color_edges") == "FD-color_edges"
    assert frechet_name("resnet50.a1_in1k") == "FD-resnet50.a1_in1k"


def test_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert fingerprint(first) != fingerprint(second)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(torch.nn.Sequential(first)) != fingerprint(first)


def test_class_path_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x):\n        return x.float().mean((2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    network = load_features("my_features.Mean")
    assert not network.training
    assert network(plain((1, 2, 3))).tolist() == [[1.0, 2.0, 3.0]]


def test_timm_resizes_and_normalises_as_the_model_asks(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    torch.manual_seed(0)
    network = load_features("resnet10t.c3_in1k")
    image = plain((200, 100, 50), 32)
    values = torch.tensor([200, 100, 50]) / 255
    normalised = ((values - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])).view(1, 3, 1, 1)
    expected = network.network(normalised.expand(1, 3, *network.input_size))
    torch.testing.assert_close(network(image), expected, rtol=1e-3, atol=1e-4)
    assert expected.shape == (1, 512)


@pytest.mark.parametrize(
    "name", ["nothing", "no.such.module.Net", "os.path.join", "torch.nn.Nothing", "collections.OrderedDict"]
)
def test_wrong_names_say_so(name):
    with pytest.raises(UserError) as caught:
        load_features(name)
    assert str(caught.value).startswith(f"--features {name}: ")
    assert "\n" not in str(caught.value)


def test_missing_inception_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match=r"torch-fidelity"):
        load_features("inception")


def test_timm_weights_that_cannot_be_fetched_are_one_line(tmp_path):
    # A process of its own: the hub library reads its environment when it is imported.
    code = "from dar_lightning.metrics.features import load_features; load_features('resnet10t.c3_in1k')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("dar_lightning.errors.UserError: --features resnet10t.c3_in1k: its pretrained")
