"""`dar fit`, `validate`, `test` and `predict`: LightningCLI with this project's defaults."""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dar_lightning.ar.backbones import import_backbone
from dar_lightning.ar.conditions import import_condition
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.loader import StreamDataModule
from dar_lightning.devices import check_srun, check_started_processes, round_convolutions_as_products
from dar_lightning.errors import OneLineErrors, UserError, check_range, naming, require
from dar_lightning.files import check_local, is_url, locked, refuse_repeated_keys
from dar_lightning.generation import predict, writer  # noqa: F401  (so that configs may name their classes short)
from dar_lightning.layers import check_compiler
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.quantizers import import_quantizer
from dar_lightning.training.ar import ARModule
from dar_lightning.training.callbacks import EarlyStoppingPatience, Faults, GlobalBatch, Provenance, StopOnSignal
from dar_lightning.training.callbacks.provenance import ConfigText
from dar_lightning.training.callbacks.stop import refusing_early_notice
from dar_lightning.training.checkpoint_io import SafeCheckpointIO
from dar_lightning.training.fixed_buckets import fix_buckets
from dar_lightning.training.tokenizer import TokenizerModule

LOGGER = "dar_lightning.training.loggers.TensorBoard"


class Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        for old, instead in TokenizerConfig.REMOVED.items():
            if re.search(rf"\b{old}\b", str(message)):
                raise UserError(f"model.init_args.config.{old} is {instead}")
        if "pytorch_lightning." in str(message):
            raise UserError("pytorch_lightning is another package, whose classes do not fit: write lightning.pytorch")
        super().error(message, ex)


class TrainerCLI(LightningCLI):
    """`dar fit|validate|test|predict`: any LightningModule and DataModule by class path.

    Args:
        argv: verb and options.
    """

    def __init__(self, argv: Sequence[str]):
        self.resolved: list[tuple[Namespace, str, Any]] = []  # where before_instantiate_classes put a folder: was
        with ExitStack() as self.held:  # the run's locks
            if list(argv)[:1] == ["fit"]:
                self.held.enter_context(refusing_early_notice())
            self._run(argv)

    def _run(self, argv: Sequence[str]) -> None:
        refuse_repeated_keys()
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # they are the command line, its files found
        try:
            super().__init__(
                args=list(argv),
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                parser_class=Parser,
                parser_kwargs={"prog": "dar"},
                save_config_callback=ConfigText,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={
                    "callbacks": [StopOnSignal(), Provenance(), EarlyStoppingPatience()]
                },  # and a config's
            )
        except (MisconfigurationException, RuntimeError) as error:  # also late: a metric that is not logged
            if isinstance(error, RuntimeError) and not str(error).startswith("Early stopping conditioned on"):
                raise
            raise UserError(" ".join(str(error).split())) from error

    def _add_instantiators(self) -> None:
        """Name the class in each error that a constructor raises."""
        super()._add_instantiators()
        makers = self.parser._instantiators  # Lightning's, of model and data, which note their arguments
        makers |= {key: _named(make) for key, make in makers.items()}
        self.parser.add_instantiator(_named(lambda kind, /, *args, **kwargs: kind(*args, **kwargs)), object)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """A checkpoint is data, not a program: no option says otherwise."""
        return {verb: skip | {"weights_only"} for verb, skip in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--global_batch",
            type=int | None,
            default=None,
            help="Samples per optimizer step over all devices, from which trainer.accumulate_grad_batches is derived.",
        )
        parser.add_argument(
            "--float32_matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="torch's: high lets GPUs multiply float32 matrices (and convolve) in TF32: faster, with 10 bits kept.",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        for place, name, given in self.resolved:  # the config that is kept says what was asked for, see below
            place[name] = given
        self.global_batch = GlobalBatch(self._get(self.config_init, "global_batch"))
        plugins = self._get(self.config_init, "trainer.plugins")
        plugins = plugins if isinstance(plugins, list) else [plugins]
        environments = [each for each in plugins if isinstance(each, ClusterEnvironment)]
        slurm = all(isinstance(each, SLURMEnvironment) for each in environments)  # unless another one is asked for
        if slurm:
            check_srun()
        with naming("trainer"):
            trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:
            name, needs = type(callback).__name__, getattr(callback, "needs", None)
            if isinstance(needs, str) and not hasattr(self.model, needs):
                raise UserError(f"trainer.callbacks: {name}: {type(self.model).__name__} has no {needs}; leave it out")
            if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
                raise UserError(f"trainer.callbacks: {name} trains a run again and again; set the option yourself")
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            raise UserError("trainer.strategy: processes that are copies of this one cannot be resumed alike; use ddp")
        if type(trainer.strategy).load_checkpoint is not Strategy.load_checkpoint:
            raise UserError(
                f"trainer.strategy: {type(trainer.strategy).__name__} reads checkpoints past SafeCheckpointIO; use ddp "
                "or, for AR models, dar_lightning.training.FSDP2Strategy"
            )
        processes = trainer.num_nodes * trainer.num_devices
        check_started_processes(processes, "trainer.devices and trainer.num_nodes", slurm)
        trainer.callbacks[:0] = [Faults(), self.global_batch]  # checkpoint callbacks stay last
        if (given := type(trainer.strategy.checkpoint_io)) is not TorchCheckpointIO:
            raise UserError(
                f"trainer.plugins: {given.__name__} cannot be used, checkpoints go through SafeCheckpointIO"
            )
        trainer.strategy.checkpoint_io = SafeCheckpointIO(self.model)
        fix_buckets(trainer.strategy)
        if any(part._compiled_call_impl is not None for part in self.model.modules()):
            check_compiler(trainer.strategy.root_device)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyperparameters never override what config and command line say."""

    def before_fit(self) -> None:
        """Wrong data is found before the run writes its first file, and so is another run in its folder."""
        data = self.datamodule
        if isinstance(data, StreamDataModule):
            for split in ("train", "val") if data.val is not None else ("train",):
                data.index(split)
            data.check_classes()
            self._check_patience(data)
        self.global_batch.derive(self.trainer, data)
        if isinstance(data, CodesDataModule) and isinstance(self.model, ARModule):
            self.model.check_data(data)
        if isinstance(self.model, TokenizerModule):
            self.model.check_data(data)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            for folder in self._written():
                self.held.enter_context(locked(folder, "trainer.default_root_dir"))

    def _check_patience(self, data: StreamDataModule) -> None:
        """While one rank waits for a server, the others wait for it in a collective: no shorter, or the run is lost."""
        timeout = getattr(self.trainer.strategy, "_timeout", None)
        if self.trainer.world_size == 1 or timeout is None:
            return
        seconds = timeout.total_seconds()
        remote = [data.index(split) for split in data.splits if getattr(data.index(split), "url", None)]
        if (patience := max((index.patience for index in remote), default=0)) >= seconds:
            raise UserError(
                f"data.patience is {patience:g} s, but ranks wait for one another {seconds:g} s only: give "
                "trainer.strategy a longer timeout, or less patience"
            )

    def _written(self) -> list[Path]:
        """The folders that a run writes to: its root, and those of checkpoints and logs elsewhere."""
        savers = [each for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        places = [saver.dirpath for saver in savers] + [logger.save_dir for logger in self.trainer.loggers]
        folders = [Path(place).absolute() for place in places if place is not None and not is_url(place)]
        root = self.root.absolute()
        return sorted({root if folder.is_relative_to(root) else folder for folder in folders})

    def _before_evaluation(self) -> None:
        """Random weights have no score: without its checkpoint, only training goes on."""
        if self.config[self.config.subcommand].ckpt_path != "last":
            return
        callbacks = [found for found in self.trainer.checkpoint_callbacks if isinstance(found, ModelCheckpoint)]
        if not any(found._find_last_checkpoints(self.trainer) for found in callbacks):
            folders = ", ".join(str(callback.dirpath) for callback in callbacks) or "no ModelCheckpoint's folder"
            raise UserError(f"ckpt_path: last: there is no last checkpoint in {folders}; train first or name a file")

    before_validate = before_test = before_predict = _before_evaluation

    def before_instantiate_classes(self) -> None:
        """One folder per run: checkpoints and logs go to default_root_dir, where the config names no other place.

        The config that a run keeps does not name these places: with another default_root_dir it is another run's.

        A quantizer, condition or backbone of the user's own is imported: this config is theirs, and names classes.
        """
        config = self.config[self.config.subcommand]
        kinds = {"quantizer": import_quantizer, "condition": import_condition, "backbone": import_backbone}
        for kind, import_class in kinds.items():
            if "." in (path := config.get(f"model.init_args.config.{kind}") or ""):
                import_class(path)
        torch.set_float32_matmul_precision(config.float32_matmul_precision)
        round_convolutions_as_products()
        steps = ("accumulate_grad_batches", "check_val_every_n_epoch")
        check_range(1, **{f"trainer.{name}": config.trainer[name] for name in steps})
        require(config.trainer.val_check_interval != 0, "trainer.val_check_interval is 0: give batches, or a share")
        trainer, self.root = config.trainer, Path(config.trainer.default_root_dir or "runs/default")
        check_local(trainer.default_root_dir, "trainer.default_root_dir")
        others = self._root_of_another_run(trainer.logger)
        callbacks = trainer.callbacks or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            if issubclass(resolve_name(callback.class_path), ModelCheckpoint):
                given = callback.init_args.dirpath
                if is_url(given):
                    with naming("trainer.callbacks.dirpath"):
                        get_filesystem(given)  # the package that a store needs may be missing
                if given is None or (others is not None and Path(given) == others / "checkpoints"):
                    self._resolve(callback.init_args, "dirpath", str(self.root / "checkpoints"))
        if trainer.logger in (None, True) or others is not None:
            arguments = Namespace(save_dir=str(self.root), name="", version="logs")
            self._resolve(trainer, "logger", Namespace(class_path=LOGGER, init_args=arguments))

    def _root_of_another_run(self, logger: Any) -> Path | None:
        """The folder that earlier versions wrote into a run's own config, if it is not this run's."""
        if not isinstance(logger, Namespace) or logger.class_path != LOGGER:
            return None
        given = logger.init_args
        root = Path(given.save_dir)
        ours = (given.get("name"), given.get("version")) == ("", "logs") and root != self.root
        return root if ours else None

    def _resolve(self, place: Namespace, name: str, value: Any) -> None:
        """Set an option to a resolved value, until the classes are made."""
        self.resolved.append((place, name, None if isinstance(place[name], (str, Namespace)) else place[name]))
        place[name] = value


def _named(make: Callable) -> Callable:
    """What makes an object of a class, with the name of the class in its errors."""

    @functools.wraps(make.__call__)  # jsonargparse looks at its parameters
    def call(kind: type, /, *args: Any, **kwargs: Any) -> Any:
        with naming(kind.__name__):
            return make(kind, *args, **kwargs)

    return call
