"""D-AR (Diffusion via Autoregressive Models, arXiv 2505.23660) in PyTorch Lightning."""

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

__version__ = "0.1.0"
__all__ = ["ARConfig", "ARModel", "DARPipeline", "SequentialDiffusionTokenizer", "TokenizerConfig"]
