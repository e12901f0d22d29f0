"""The tests' smallest models and data, for runs of which not the speed is measured."""

import sys

from benchmarks.machine import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from tiny_models import AR, TOKENIZER, fit_ar, fit_tokenizer, make_tokenizer, write_images, write_tokens

__all__ = ["AR", "TOKENIZER", "fit_ar", "fit_tokenizer", "make_tokenizer", "write_images", "write_tokens"]
