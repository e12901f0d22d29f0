"""What a run writes of itself: its config as text in TensorBoard, and which code made which steps."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from dar_lightning.errors import naming
from dar_lightning.files import write_text
from dar_lightning.records.provenance import FILE, provenance
from dar_lightning.training.loggers import writers


class ConfigText(SaveConfigCallback):
    """Lightning's config.yaml beside the logs, and the same as text in TensorBoard: every value that training uses."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        """Later: what only reads a run, or cannot train, must not replace the config that made it."""

    def on_train_start(self, trainer, pl_module) -> None:
        with naming("trainer.default_root_dir", OSError):
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer, pl_module, stage) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's way to keep lines as they are
        for writer in writers(trainer):
            writer.add_text("config", indented, trainer.global_step)


class Provenance(Callback):
    """Notes which code made which steps: in `provenance.json` beside config.yaml, and as `provenance` in checkpoints.

    Both hold a list; each entry is what `records.provenance.provenance` says, the step from which on it holds
    (`from_step`), and the number of processes. A resumed run adds one to the list of its checkpoint if it differs.
    """

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.mine = provenance(trainer.strategy.root_device, trainer.precision)
            self.mine["world_size"] = trainer.world_size

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.made = checkpoint.get("provenance", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.made or self.made[-1] != {"from_step": self.made[-1]["from_step"]} | self.mine:
            self.made = [*self.made, {"from_step": trainer.global_step} | self.mine]
        folder = trainer.log_dir  # on all ranks, as it is broadcast
        if trainer.is_global_zero and folder is not None:
            write_text(Path(folder) / FILE, json.dumps(self.made, indent=2) + "\n")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["provenance"] = self.made
