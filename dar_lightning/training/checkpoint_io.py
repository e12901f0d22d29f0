"""Checkpoint IO of the Trainer: atomic writes, reading as data (weights_only), checks of the model."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule

from dar_lightning.errors import UserError, naming
from dar_lightning.files import atomic_path, is_url
from dar_lightning.formats.checkpoint import read_checkpoint
from dar_lightning.formats.pretrained import compare_tensors
from dar_lightning.weights.lightning import PARTS, split_model


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their target, to the disk, then renames; reads them without running anything in them.

    Lightning's own writer holds a second copy in memory and goes through the temporary folder, which may be full or on
    another disk. Its own reader would run a checkpoint from a URL, and its error for another model is a page long.

    A checkpoint at a URL goes through the temporary folder, whole, in both directions: by fsspec, whose stores (S3,
    Google Cloud and the like) show an upload when it is complete.

    Args:
        module: the LightningModule that the checkpoints are for; a checkpoint of another shape is refused by name.
            Where it has neither a tokenizer nor an AR model, Lightning checks the tensors itself.
    """

    def __init__(self, module: LightningModule):
        super().__init__()
        self.module = module

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint atomically; a UserError says that the disk is full or the folder or store read-only."""
        if not is_url(path):
            with atomic_path(path) as part, open(part, "wb") as file:
                torch.save(checkpoint, file)
            return
        with naming(f"cannot write {path}"), tempfile.NamedTemporaryFile() as file:
            torch.save(checkpoint, file)
            file.flush()
            get_filesystem(path).put_file(file.name, str(path))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        """The checkpoint, its tensors on the CPU.

        Raises:
            UserError: if the file is missing, broken, malicious, or of a model with other tensors.
        """
        checkpoint = _read_url(str(path)) if is_url(path) else _read_file(Path(path))
        if not any(hasattr(self.module, part) for part in PARTS):
            return checkpoint
        if hasattr(self.module, "check_checkpoint"):
            self.module.check_checkpoint(checkpoint)
        # With EMAWeightAveraging there are two sets: the average, and what the optimizer works on.
        for key in ("state_dict", *checkpoint.keys() & {"current_model_state"}):
            part, tensors = split_model(checkpoint, key, path)
            if (model := getattr(self.module, part, None)) is None:
                raise UserError(f"{path} is of the {part} part: this run trains a {type(self.module).__name__}")
            compare_tensors(model.state_dict(), tensors, path, type(model).__name__)
        return checkpoint


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(path)
    except UserError as error:
        others = [other for other in path.parent.glob("*.ckpt") if other.name != path.name]
        if not path.is_file() or not others:
            raise
        newest = max(others, key=lambda other: other.stat().st_mtime_ns)
        raise UserError(f"{error}; the next older checkpoint is {newest}, for --ckpt_path") from error


def _read_url(url: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(url).name)
        with naming(f"cannot read {url}"):
            get_filesystem(url).get_file(url, str(copy))
        try:
            return read_checkpoint(copy)
        except UserError as error:
            raise UserError(str(error).replace(str(copy), url)) from None
