"""LightningModules: what a training step does. The models themselves are plain torch, in `tokenizer` and `ar`."""

from dar_lightning.training.ablation import AblationModule
from dar_lightning.training.ar import ARModule
from dar_lightning.training.fsdp import FSDP2Strategy
from dar_lightning.training.tokenizer import TokenizerModule

__all__ = ["ARModule", "AblationModule", "FSDP2Strategy", "TokenizerModule"]
