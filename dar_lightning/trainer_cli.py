"""LightningCLI for the Trainer verbs, with what a run of this project always wants."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dar_lightning.errors import OneLineErrors


class Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class TrainerCLI(LightningCLI):
    """`dar fit|validate|test|predict`: any LightningModule and DataModule by class path.

    Args:
        argv: verb and options.
    """

    def __init__(self, argv: Sequence[str]):
        torch.set_float32_matmul_precision("high")
        super().__init__(
            args=list(argv) if list(argv) != sys.argv[1:] else None,  # Lightning warns if given what it would read
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "dar"},
            save_config_kwargs={"overwrite": True},
        )

    def _prepare_subcommand_parser(self, klass, subcommand: str, **kwargs):
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # a checkpoint is data, not a program
        return parser

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyperparameters never override what config and command line say."""

    def before_instantiate_classes(self) -> None:
        """One folder per run: checkpoints and logs go to default_root_dir, where the config names no other place."""
        trainer = self.config[self.config.subcommand].trainer
        root = Path(trainer.default_root_dir or "runs/default")
        for callback in trainer.callbacks or []:
            if callback.class_path.endswith("ModelCheckpoint") and callback.init_args.dirpath is None:
                callback.init_args.dirpath = str(root / "checkpoints")
        if trainer.logger in (None, True):
            arguments = Namespace(save_dir=str(root), name="", version="logs")
            trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=arguments)
