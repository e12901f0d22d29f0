"""Callbacks: checkpoints, EMA, signals, monitors, FID in validation, pictures."""

from dar_lightning.training.callbacks.checkpoint import LastStepCheckpoint
from dar_lightning.training.callbacks.codebook_monitor import CodebookMonitor
from dar_lightning.training.callbacks.codebook_warmup import CodebookWarmup
from dar_lightning.training.callbacks.ema import EMA
from dar_lightning.training.callbacks.generation_fid import GenerationFID
from dar_lightning.training.callbacks.global_batch import GlobalBatch
from dar_lightning.training.callbacks.group_loss import GroupLoss
from dar_lightning.training.callbacks.memory import Memory
from dar_lightning.training.callbacks.optimizer_monitor import OptimizerMonitor
from dar_lightning.training.callbacks.position_loss import PositionLoss
from dar_lightning.training.callbacks.provenance import Provenance
from dar_lightning.training.callbacks.reconstruction_fid import ReconstructionFID
from dar_lightning.training.callbacks.reconstructions import Reconstructions
from dar_lightning.training.callbacks.samples import Samples
from dar_lightning.training.callbacks.skip_bad_steps import SkipBadSteps
from dar_lightning.training.callbacks.stop import StopOnSignal
from dar_lightning.training.callbacks.throughput import Throughput
from dar_lightning.training.callbacks.token_influence import TokenInfluence

__all__ = [
    "EMA",
    "CodebookMonitor",
    "CodebookWarmup",
    "GenerationFID",
    "GlobalBatch",
    "GroupLoss",
    "LastStepCheckpoint",
    "Memory",
    "OptimizerMonitor",
    "PositionLoss",
    "Provenance",
    "ReconstructionFID",
    "Reconstructions",
    "Samples",
    "SkipBadSteps",
    "StopOnSignal",
    "Throughput",
    "TokenInfluence",
]
