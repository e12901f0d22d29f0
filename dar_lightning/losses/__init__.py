"""Losses of the tokenizer beside flow matching and codebook, off unless a config asks for them."""

from dar_lightning.losses.adversarial import AdversarialLoss
from dar_lightning.losses.perceptual import PerceptualLoss
from dar_lightning.losses.repa import RepaLoss

__all__ = ["AdversarialLoss", "PerceptualLoss", "RepaLoss"]
