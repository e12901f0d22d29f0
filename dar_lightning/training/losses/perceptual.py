"""LPIPS (VGG16) between the jump estimate and the image."""

import torch
from torch import Tensor

from dar_lightning.errors import require
from dar_lightning.metrics.lpips import lpips_network
from dar_lightning.training.losses.weighting import WeightedLoss


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
        require(stride >= 1, f"stride is {stride}: it must be at least 1, which sees every image")
        self.stride = stride
        self.distance = lpips_network(weights_path)

    def __call__(self, x1_hat: Tensor, images: Tensor, t: Tensor) -> Tensor:
        """Mean of t^t_power LPIPS over batches (B, 3, H, W) in [-1, 1], H, W >= 32, times t (B,); without `weight`."""
        first = int(torch.randint(min(self.stride, len(t)), ()))
        seen = slice(first, None, self.stride)
        return self.mean(self.distance(x1_hat[seen], images[seen]), t[seen])
