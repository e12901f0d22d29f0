"""Callbacks: checkpoints, EMA, signals, monitors, passes, FID in validation, pictures."""

from dar_lightning.training.callbacks.checkpoint import LastStepCheckpoint
from dar_lightning.training.callbacks.codebook_warmup import CodebookWarmup
from dar_lightning.training.callbacks.early_stopping_patience import EarlyStoppingPatience
from dar_lightning.training.callbacks.ema import EMA
from dar_lightning.training.callbacks.faults import Faults
from dar_lightning.training.callbacks.fid import GenerationFID, ReconstructionFID
from dar_lightning.training.callbacks.global_batch import GlobalBatch
from dar_lightning.training.callbacks.monitors import (
    CodebookMonitor,
    GroupLoss,
    Memory,
    OptimizerMonitor,
    PositionLoss,
    TokenInfluence,
)
from dar_lightning.training.callbacks.passes import Passes
from dar_lightning.training.callbacks.pictures import Reconstructions, Samples
from dar_lightning.training.callbacks.provenance import Provenance
from dar_lightning.training.callbacks.skip_bad_steps import SkipBadSteps
from dar_lightning.training.callbacks.stop import StopOnSignal
from dar_lightning.training.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "CodebookMonitor",
    "CodebookWarmup",
    "EarlyStoppingPatience",
    "Faults",
    "GenerationFID",
    "GlobalBatch",
    "GroupLoss",
    "LastStepCheckpoint",
    "Memory",
    "OptimizerMonitor",
    "Passes",
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
