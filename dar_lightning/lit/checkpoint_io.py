"""How the Trainer reads checkpoints: as data, and only those of the model at hand."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from dar_lightning.checkpoint import read_checkpoint
from dar_lightning.errors import UserError
from dar_lightning.pretrained import check_tensors
from dar_lightning.weights import PARTS, split_model


class SafeCheckpointIO(TorchCheckpointIO):
    """Reads what the Trainer resumes from without running anything in it, whatever `weights_only` says.

    Lightning's own reader would run a checkpoint from a URL, and its error for another model is a page long.

    Args:
        module: the LightningModule that the checkpoints are for; a checkpoint of another shape is refused by name.
            Where it has neither a tokenizer nor an AR model, Lightning checks the tensors itself.
    """

    def __init__(self, module: LightningModule):
        super().__init__()
        self.module = module

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """The checkpoint, its tensors on the CPU.

        Raises:
            UserError: if the file is missing, broken, malicious, or of a model with other tensors.
        """
        checkpoint = read_checkpoint(path)
        if not any(hasattr(self.module, part) for part in PARTS):
            return checkpoint
        # With EMAWeightAveraging there are two sets: the average, and what the optimizer works on.
        for key in ("state_dict", "current_model_state"):
            if key == "state_dict" or key in checkpoint:
                part, tensors = split_model(checkpoint, key, path)
                model = getattr(self.module, part, None)
                if model is None:
                    raise UserError(f"{path} is of the {part} part: this run trains a {type(self.module).__name__}")
                check_tensors(model, tensors, path)
        return checkpoint
