"""Losses of the tokenizer beside flow matching and codebook, off unless a config asks for them."""

from dar_lightning.training.losses.adversarial import AdversarialLoss
from dar_lightning.training.losses.perceptual import PerceptualLoss
from dar_lightning.training.losses.repa import RepaLoss

__all__ = ["AdversarialLoss", "PerceptualLoss", "RepaLoss"]
