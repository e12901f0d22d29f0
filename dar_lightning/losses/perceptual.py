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
        t_power: an image's loss is multiplied by its flow time t (0: noise, 1: image) to this power. 0 is the paper's.
            LPIPS wants texture in estimates that know too little for it: above 0, coarse previews stay smooth.
        stride: see only every stride-th image of a batch, from a random one on: the same gradient on average, for a
            part of the time.

    Raises:
        UserError: if the file is no VGG16, there is none and the download fails, or stride or t_power is out of range.
    """

    def __init__(self, weight: float = 0.5, weights_path: str | None = None, t_power: float = 0.0, stride: int = 1):
        if stride < 1:
            raise UserError(f"stride is {stride}: it must be at least 1, which sees every image")
        if t_power < 0:
            raise UserError(f"t_power is {t_power}: it must be at least 0, which weighs all times alike")
        self.weight, self.t_power, self.stride = weight, t_power, stride
        try:
            lpips = _LPIPS(net="vgg", pnet_rand=weights_path is not None)
        except OSError as error:
            raise UserError(f"VGG16 cannot be downloaded ({one_line(error)}): set weights_path to a file") from error
        if weights_path is not None:
            self._load(lpips.net, weights_path)
        self.lpips = FrozenNetwork(lpips.to(memory_format=torch.channels_last))  # faster in bf16, on CPUs too

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
        lpips = self.lpips(x1_hat[seen].float(), images[seen].float()).flatten()  # (b,)
        return (t[seen] ** self.t_power * lpips).mean()
