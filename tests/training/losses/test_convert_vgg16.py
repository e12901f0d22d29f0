"""The script that takes VGG16 out of a pickle of numpy arrays: names, layouts, and nothing but arrays."""

import importlib.util
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torchmetrics.functional.image.lpips import _LPIPS

from dar_lightning.training.losses import PerceptualLoss

SCRIPT = Path(__file__).parents[3] / "data" / "convert_vgg16.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_vgg16", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return torchvision.models.vgg16(weights=None).features


@pytest.fixture(scope="module")
def tree(vgg):
    """What the package holds: numpy arrays, height and width first, of a network whose weights are known."""
    layers = [layer for layer in vgg if isinstance(layer, torch.nn.Conv2d)]
    heads = _LPIPS(net="vgg", pnet_rand=True).lins

    def hwio(weight):
        return weight.detach().permute(2, 3, 1, 0).contiguous().numpy()

    tree = {
        "VGG16_0": {
            f"Conv_{i}": {"kernel": hwio(layer.weight), "bias": layer.bias.detach().numpy()}
            for i, layer in enumerate(layers)
        }
    }
    return tree | {f"NetLinLayer_{i}": {"Conv_0": {"kernel": hwio(h.model[-1].weight)}} for i, h in enumerate(heads)}


def test_converted_weights_are_torchvisions(script, tree, vgg, tmp_path, monkeypatch):
    checkpoint, output = tmp_path / "vgg16.ckpt", tmp_path / "vgg16.safetensors"
    # as numpy 1 wrote the published file: the unpickler knows these names
    content = pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    checkpoint.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["convert", "--checkpoint", str(checkpoint), "--output", str(output)])
    script.main()
    loss = PerceptualLoss(weights_path=str(output))
    x = torch.rand(1, 3, 32, 32)
    theirs = x
    for layer in vgg[:-1]:  # up to the last ReLU
        theirs = layer(theirs)
    torch.testing.assert_close(loss.distance.network.vgg(x)[-1], theirs)


def test_a_head_that_differs_is_refused(script, tree):
    changed = tree | {"NetLinLayer_2": {"Conv_0": {"kernel": tree["NetLinLayer_2"]["Conv_0"]["kernel"] + 1}}}
    content = pickle.dumps(changed, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with pytest.raises(ValueError, match="linear head 2"):
        script.convert(content)


class Malice:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_of_anything_else_is_refused(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="is not a part of an array"):
        script.convert(pickle.dumps({"VGG16_0": Malice()}))
    assert not (tmp_path / "pwned").exists()
