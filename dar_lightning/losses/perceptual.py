"""LPIPS (VGG16) between the jump estimate and the image."""

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from dar_lightning.checkpoint import read_checkpoint
from dar_lightning.errors import UserError
from dar_lightning.losses.frozen import FrozenNetwork
from dar_lightning.pretrained import one_line


class PerceptualLoss:
    """LPIPS with torchmetrics' VGG16 network and the published linear heads, which come with torchmetrics.

    Args:
        weight: factor of this loss (paper: 0.5).
        weights_path: a file of torchvision's VGG16 (`vgg16-397923af.pth`); None lets torchvision download it.

    Raises:
        UserError: if the file is no VGG16, or there is none and the download fails.
    """

    def __init__(self, weight: float = 0.5, weights_path: str | None = None):
        self.weight = weight
        try:
            lpips = _LPIPS(net="vgg", pnet_rand=weights_path is not None)
        except OSError as error:
            raise UserError(f"VGG16 cannot be downloaded ({one_line(error)}): set weights_path to a file") from error
        if weights_path is not None:
            self._load(lpips.net, weights_path)
        self.lpips = FrozenNetwork(lpips)

    @staticmethod
    def _load(vgg: torch.nn.Module, path: str) -> None:
        tensors, own = read_checkpoint(path), vgg.state_dict()
        # slice2.5.weight here is features.5.weight in torchvision.
        theirs = {name: tensors.get(f"features.{name.split('.', 1)[1]}") for name in own}
        wrong = [name for name in own if theirs[name] is None or theirs[name].shape != own[name].shape]
        if wrong:
            raise UserError(f"weights_path {path} is no VGG16 of torchvision: {wrong[0]} is missing or misshapen")
        vgg.load_state_dict(theirs)

    def __call__(self, x1_hat: Tensor, images: Tensor) -> Tensor:
        """Mean LPIPS of two batches (B, 3, H, W) in [-1, 1], H, W >= 32: a scalar, not yet weighted."""
        return self.lpips(x1_hat.float(), images.float()).mean()
