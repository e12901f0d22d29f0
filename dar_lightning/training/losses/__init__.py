"""Optional losses of the tokenizer: LPIPS, REPA, PatchGAN."""

from dar_lightning.training.losses.adversarial import AdversarialLoss
from dar_lightning.training.losses.perceptual import PerceptualLoss
from dar_lightning.training.losses.repa import RepaLoss

__all__ = ["AdversarialLoss", "PerceptualLoss", "RepaLoss"]
