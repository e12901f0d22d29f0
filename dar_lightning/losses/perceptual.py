"""LPIPS (VGG16) between the jump estimate and the image."""

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS, _normalize_tensor

from dar_lightning.checkpoint import read_checkpoint
from dar_lightning.errors import UserError
from dar_lightning.losses.frozen import FrozenNetwork
from dar_lightning.losses.weighting import WeightedLoss
from dar_lightning.pretrained import one_line


class PerceptualLoss(WeightedLoss):
    """LPIPS with torchmetrics' VGG16 network and the published linear heads, which come with torchmetrics.

    Under bf16-mixed VGG16 runs in bfloat16; features are normalised, compared and averaged in float32.

    Args:
        weight: factor of this loss (paper: 0.5).
        weights_path: a file of torchvision's VGG16 (`vgg16-397923af.pth`); None lets torchvision download it.
        t_power: see WeightedLoss. LPIPS wants texture in estimates that know too little for it: above 0, coarse
            previews stay smooth.
        stride: see only every stride-th image of a batch, from a random one on: the same gradient on average, for a
            part of the time.
        start_step: optimizer steps without this loss.

    Raises:
        UserError: if the file is no VGG16, there is none and the download fails, or an option is out of range.
    """

    def __init__(
        self,
        weight: float = 0.5,
        weights_path: str | None = None,
        t_power: float = 0.0,
        stride: int = 1,
        start_step: int = 0,
    ):
        super().__init__(weight, t_power, start_step)
        if stride < 1:
            raise UserError(f"stride is {stride}: it must be at least 1, which sees every image")
        self.stride = stride
        try:
            lpips = _LPIPS(net="vgg", pnet_rand=weights_path is not None)
        except OSError as error:
            raise UserError(f"VGG16 cannot be downloaded ({one_line(error)}): set weights_path to a file") from error
        if weights_path is not None:
            self._load(lpips.net, weights_path)
        # channels_last is faster in bf16, on CPUs too
        self.distance = FrozenNetwork(_Distance(lpips).to(memory_format=torch.channels_last))

    @staticmethod
    def _load(vgg: torch.nn.Module, path: str) -> None:
        tensors, own = read_checkpoint(path), vgg.state_dict()
        # slice2.5.weight here is features.5.weight in torchvision.
        theirs = {name: tensors.get(f"features.{name.split('.', 1)[1]}") for name in own}
        wrong = [name for name in own if theirs[name] is None or theirs[name].shape != own[name].shape]
        if wrong:
            raise UserError(f"weights_path {path} is no VGG16 of torchvision: {wrong[0]} is missing or misshapen")
        vgg.load_state_dict(theirs)

    def __call__(self, x1_hat: Tensor, images: Tensor, t: Tensor) -> Tensor:
        """Mean of t^t_power LPIPS over two batches (B, 3, H, W) in [-1, 1], H, W >= 32, and times t (B,).

        Returns:
            A scalar, not yet multiplied by `weight`.
        """
        first = int(torch.randint(min(self.stride, len(t)), ()))
        seen = slice(first, None, self.stride)
        return self.mean(self.distance(x1_hat[seen], images[seen]), t[seen])


class _Distance(nn.Module):
    """LPIPS of each pair: two batches (B, 3, H, W) in [-1, 1] -> (B,)."""

    def __init__(self, lpips: _LPIPS):
        super().__init__()
        self.scale, self.vgg, self.heads = lpips.scaling_layer, lpips.net, lpips.lins

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        features = [self.vgg(self.scale(images.float())) for images in (first, second)]
        # bfloat16 keeps 8 bits: a difference of features that are nearly equal would have none of them left.
        with torch.autocast(first.device.type, enabled=False):
            distance = torch.zeros(len(first), device=first.device)
            for head, one, other in zip(self.heads, *features, strict=True):  # (B, C, h, w) each
                squares = (_normalize_tensor(one.float()) - _normalize_tensor(other.float())) ** 2
                distance = distance + head(squares).mean(dim=(1, 2, 3))
            return distance
