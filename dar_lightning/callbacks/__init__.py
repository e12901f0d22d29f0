"""What happens around training steps."""

from dar_lightning.callbacks.bad_steps import SkipBadSteps
from dar_lightning.callbacks.checkpoint import LastStepCheckpoint
from dar_lightning.callbacks.codebook import CodebookWarmup
from dar_lightning.callbacks.codebook_use import CodebookMonitor
from dar_lightning.callbacks.data_speed import DataSpeed
from dar_lightning.callbacks.ema import EMA
from dar_lightning.callbacks.generation_fid import GenerationFID
from dar_lightning.callbacks.global_batch import GlobalBatch
from dar_lightning.callbacks.groups import GroupLoss
from dar_lightning.callbacks.memory import Memory
from dar_lightning.callbacks.optimization import OptimizerMonitor
from dar_lightning.callbacks.positions import PositionLoss
from dar_lightning.callbacks.previews import Reconstructions
from dar_lightning.callbacks.provenance import Provenance
from dar_lightning.callbacks.reconstruction_fid import ReconstructionFID
from dar_lightning.callbacks.sample_writer import SampleWriter
from dar_lightning.callbacks.samples import Samples
from dar_lightning.callbacks.stop import StopOnSignal
from dar_lightning.callbacks.throughput import Throughput
from dar_lightning.callbacks.token_influence import TokenInfluence

__all__ = [
    "EMA",
    "CodebookMonitor",
    "CodebookWarmup",
    "DataSpeed",
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
    "SampleWriter",
    "Samples",
    "SkipBadSteps",
    "StopOnSignal",
    "Throughput",
    "TokenInfluence",
]
