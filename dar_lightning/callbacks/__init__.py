"""What happens around training steps."""

from dar_lightning.callbacks.checkpoint import LastStepCheckpoint
from dar_lightning.callbacks.codebook import CodebookWarmup
from dar_lightning.callbacks.previews import Reconstructions
from dar_lightning.callbacks.samples import Samples

__all__ = ["CodebookWarmup", "LastStepCheckpoint", "Reconstructions", "Samples"]
