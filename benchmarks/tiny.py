"""The tests' smallest models and data, for runs of which not the speed is measured, and options of `dar fit`."""

import sys

from benchmarks.machine import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from tiny_models import AR, TOKENIZER, fit_ar, fit_tokenizer, make_tokenizer, write_images, write_tokens, write_vgg
from tiny_models import options as option_words

__all__ = ["AR", "TOKENIZER", "callback", "fit_ar", "fit_tokenizer", "make_tokenizer", "option_words"]
__all__ += ["write_images", "write_tokens", "write_vgg"]


def callback(name: str, module: str, /, **options) -> list[str]:
    """Words that add a callback."""
    return [f"--trainer.callbacks+={module}.{name}", *option_words("trainer.callbacks", options)]
