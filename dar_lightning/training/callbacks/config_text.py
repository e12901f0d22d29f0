"""The run's config as text in TensorBoard."""

from lightning.pytorch.cli import SaveConfigCallback

from dar_lightning.files import users_path
from dar_lightning.training.callbacks.pictures import writers


class ConfigText(SaveConfigCallback):
    """Lightning's config.yaml beside the logs, and the same as text in TensorBoard: every value that training uses."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":  # what only reads a run must not replace the config that made it
            with users_path("trainer.default_root_dir"):
                super().setup(trainer, pl_module, stage)

    def save_config(self, trainer, pl_module, stage) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's way to keep lines as they are
        for writer in writers(trainer):
            writer.add_text("config", indented, trainer.global_step)
