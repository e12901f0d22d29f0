"""Our LPIPS against the `lpips` package, values and gradients, on ImageNet's VGG16.

Runs where that package is installed and DAR_VGG16 names a file made by data/convert_vgg16.py, or runs/vgg16.safetensors
is one.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dar_lightning.formats.checkpoint import read_checkpoint
from dar_lightning.training.losses import PerceptualLoss

FILE = Path(os.environ.get("DAR_VGG16", Path(__file__).parents[3] / "runs" / "vgg16.safetensors"))


@pytest.mark.skipif(not FILE.is_file(), reason="no VGG16: set DAR_VGG16 to a file of data/convert_vgg16.py")
def test_values_and_gradients_are_those_of_the_package():
    """Of smooth pictures, and the same with noise of growing strength: (4, 3, 64, 64) in [-1, 1]."""
    published = pytest.importorskip("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    tensors = read_checkpoint(FILE)
    for name, parameter in published.net.named_parameters():
        parameter.data.copy_(tensors["features." + name.split(".", 1)[1]])
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1, size=64, mode="bicubic").clamp(-1, 1)
    strength = torch.tensor([0.02, 0.1, 0.3, 1.0]).view(4, 1, 1, 1)
    noisy = (images + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    found = []
    for distance in (PerceptualLoss(weights_path=str(FILE)).distance, published):
        first = noisy.clone().requires_grad_()
        values = distance(first, images)
        found.append((values.detach().flatten(), torch.autograd.grad(values.sum(), first)[0]))
    (mine, my_gradient), (theirs, their_gradient) = found
    assert theirs.min() > 0.01
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # Seen where features vanish: torchmetrics adds 1e-8 under the root of their norm, the package 1e-10 beside it.
    assert (my_gradient - their_gradient).norm() < 2e-3 * their_gradient.norm()
