"""D-AR (Diffusion via Autoregressive Models, arXiv 2505.23660) in PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dar_lightning.ar.config import ARConfig
    from dar_lightning.ar.model import ARModel
    from dar_lightning.generation.pipeline import DARPipeline
    from dar_lightning.tokenizer.config import TokenizerConfig
    from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

__version__ = "0.1.0"
__all__ = ["ARConfig", "ARModel", "DARPipeline", "SequentialDiffusionTokenizer", "TokenizerConfig"]

# Imported when they are asked for, so that `dar --help` need not import torch.
_MODULES = {
    "ARConfig": "ar.config",
    "ARModel": "ar.model",
    "DARPipeline": "generation.pipeline",
    "SequentialDiffusionTokenizer": "tokenizer.model",
    "TokenizerConfig": "tokenizer.config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
