"""What happens around training steps."""

from dar_lightning.callbacks.checkpoint import LastStepCheckpoint
from dar_lightning.callbacks.codebook import CodebookWarmup
from dar_lightning.callbacks.data_speed import DataSpeed
from dar_lightning.callbacks.previews import Reconstructions
from dar_lightning.callbacks.samples import Samples

__all__ = ["CodebookWarmup", "DataSpeed", "LastStepCheckpoint", "Reconstructions", "Samples"]
