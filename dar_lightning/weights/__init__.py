"""Weights from elsewhere into our models: the official release, and checkpoints of `dar fit`."""

from dar_lightning.weights.official import load_official_ar, load_official_tokenizer

__all__ = ["load_official_ar", "load_official_tokenizer"]
