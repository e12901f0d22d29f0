"""Losses of the tokenizer that need a pretrained network; off unless a config asks for them."""

from dar_lightning.losses.perceptual import PerceptualLoss
from dar_lightning.losses.repa import RepaLoss

__all__ = ["PerceptualLoss", "RepaLoss"]
