"""LightningModules: what a training step does. The models themselves are plain torch, in `tokenizer` and `ar`."""

from dar_lightning.lit.ablation import AblationModule
from dar_lightning.lit.ar import ARModule
from dar_lightning.lit.fsdp import FSDP2Strategy
from dar_lightning.lit.generation import GenerationModule
from dar_lightning.lit.tokenizer import TokenizerModule

__all__ = ["ARModule", "AblationModule", "FSDP2Strategy", "GenerationModule", "TokenizerModule"]
