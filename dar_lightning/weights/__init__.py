"""Weights from elsewhere into our models, and out: the official release, checkpoints of `dar fit`, transformers."""

from dar_lightning.weights.llama import load_llama, save_llama
from dar_lightning.weights.official import load_official_ar, load_official_tokenizer

__all__ = ["load_llama", "load_official_ar", "load_official_tokenizer", "save_llama"]
