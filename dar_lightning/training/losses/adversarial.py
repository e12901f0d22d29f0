"""A PatchGAN discriminator that learns beside the tokenizer (arXiv 1611.07004, 2012.09841). Not in the paper; off."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dar_lightning.errors import UserError, require
from dar_lightning.training.losses.weighting import WeightedLoss

MAX_WIDENING = 8  # channels of the deepest layers, in multiples of the first one's


class PatchDiscriminator(nn.Sequential):
    """Convolutions that judge overlapping patches: images (B, 3, H, W) -> logits (B, 1, h, w), high for real.

    Its normalisation is GroupNorm. pix2pix's BatchNorm would make an image's logits depend on its batch and its rank,
    and keeps running statistics, which DDP overwrites with rank 0's between the two passes of a step.

    Args:
        channels: of the first layer; doubled by every further one, up to 8 times as many.
        depth: layers that halve the sides. 3 gives patches of 70x70 pixels.
    """

    def __init__(self, channels: int = 64, depth: int = 3):
        widths = [channels * min(2**i, MAX_WIDENING) for i in range(depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, depth + 1):
            stride = 2 if i < depth else 1
            convolution = nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(min(32, channels), widths[i]), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)


class AdversarialLoss(nn.Module, WeightedLoss):
    """Hinge losses of a discriminator and of the tokenizer that it judges, for one optimizer and one backward pass.

    The discriminator learns from the first step on, the tokenizer from it after `start_step` steps: then its gradient
    comes from a discriminator that knows something, and under DDP no parameter is ever without a gradient.

    Args:
        weight: factor of the tokenizer's part (VQGAN: 0.5, there times an adaptive factor that is not used here). The
            discriminator's own loss has a factor of 1: no other loss reaches its parameters.
        start_step: optimizer steps that the tokenizer takes before it feels the discriminator.
        t_power: see WeightedLoss; only for the tokenizer, the discriminator learns from all times alike.
        channels: channels of the discriminator's first layer, a multiple of 32 or below 32.
        depth: its layers that halve the sides.
    """

    def __init__(
        self, weight: float = 0.5, start_step: int = 0, t_power: float = 0.0, channels: int = 64, depth: int = 3
    ):
        nn.Module.__init__(self)
        WeightedLoss.__init__(self, weight, t_power, start_step)
        require(depth >= 1, f"depth is {depth}: it must be at least 1")
        if channels < 1 or channels % min(32, channels):
            raise UserError(f"channels is {channels}: it must be a multiple of 32, or from 1 to 31")
        self.channels, self.depth = channels, depth
        self.discriminator = PatchDiscriminator(channels, depth)

    def forward(self, x1_hat: Tensor, images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of one step over estimates and images (B, 3, H, W) in [-1, 1], at flow times t (B,).

        Returns:
            The tokenizer's loss, without `weight`, whose gradient reaches x1_hat and not the discriminator; and the
            discriminator's, 1 where it knows nothing and 0 where nothing deceives it, whose gradient reaches it alone.
        """
        real, fake = self.discriminator(torch.cat([images, x1_hat.detach()])).float().chunk(2)
        discriminator = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        judged = functional_call(self.discriminator, frozen, x1_hat).float()  # (B, 1, h, w)
        return self.mean(-judged.mean(dim=(1, 2, 3)), t), discriminator
