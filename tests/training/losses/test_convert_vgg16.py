"""The script that takes VGG16 out of a pickle of numpy arrays: names, layouts, and nothing but arrays."""

import os
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from tiny_models import random_vgg
from torchmetrics.functional.image.lpips import _LPIPS

from dar_lightning.training.losses import PerceptualLoss

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "data" / "convert_vgg16.py"))


@pytest.fixture(scope="module")
def vgg():
    return random_vgg()


@pytest.fixture(scope="module")
def tree(vgg):
    """What the package holds: numpy arrays, height and width first, of a network whose weights are known."""
    layers = [layer for layer in vgg if isinstance(layer, torch.nn.Conv2d)]
    heads = [head.model[-1] for head in _LPIPS(net="vgg", pnet_rand=True).lins]
    kernels = [layer.weight.detach().permute(2, 3, 1, 0).contiguous().numpy() for layer in (*layers, *heads)]
    pairs = zip(layers, kernels, strict=False)
    convolutions = [{"kernel": kernel, "bias": layer.bias.detach().numpy()} for layer, kernel in pairs]
    tree = {"VGG16_0": {f"Conv_{i}": convolution for i, convolution in enumerate(convolutions)}}
    return tree | {f"NetLinLayer_{i}": {"Conv_0": {"kernel": k}} for i, k in enumerate(kernels[len(layers) :])}


def test_converted_weights_are_torchvisions(tree, vgg, tmp_path, monkeypatch):
    checkpoint, output = tmp_path / "vgg16.ckpt", tmp_path / "vgg16.safetensors"
    # as numpy 1 wrote the published file: the unpickler knows these names
    checkpoint.write_bytes(pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    monkeypatch.setattr("sys.argv", ["convert", "--checkpoint", str(checkpoint), "--output", str(output)])
    SCRIPT["main"]()
    loss = PerceptualLoss(weights_path=str(output))
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loss.distance.network.vgg(x)[-1], vgg[:-1](x))  # up to the last ReLU


class Malice:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_what_is_refused(tree, tmp_path, monkeypatch):
    """A head that differs from the published one, and a pickle of anything but arrays."""
    changed = tree | {"NetLinLayer_2": {"Conv_0": {"kernel": tree["NetLinLayer_2"]["Conv_0"]["kernel"] + 1}}}
    content = pickle.dumps(changed, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with pytest.raises(ValueError, match="linear head 2"):
        SCRIPT["convert"](content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="is not a part of an array"):
        SCRIPT["convert"](pickle.dumps({"VGG16_0": Malice()}))
    assert not (tmp_path / "pwned").exists()
