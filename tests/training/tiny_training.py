"""Modules, data and quiet Trainers that the tests of training share, and what TensorBoard's files hold."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import AR, SIZE, TOKENIZER, make_ar, make_tokenizer

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.training import ARModule, TokenizerModule

STILL = dict.fromkeys(("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"), 0.0)
QUIET = dict(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)


# New models put out zeros, whatever they are given: these have the weights of made-up trained ones.
def tokenizer_module(config: dict | None = None, **options) -> TokenizerModule:
    module = TokenizerModule(TokenizerConfig(**TOKENIZER | (config or {})), **options)
    module.tokenizer.load_state_dict(make_tokenizer(**config or {}).state_dict())
    return module


def ar_module(config: dict | None = None, kind: type[ARModule] = ARModule, **options) -> ARModule:
    module = kind(ARConfig(**AR | (config or {})), **options)
    module.ar.load_state_dict(make_ar(**config or {}).state_dict())
    return module


def image_data(images: tuple[str, str], batch_size: int = 4) -> ImageNetDataModule:
    return ImageNetDataModule(*images, image_size=SIZE, batch_size=batch_size)


def token_data(tokens: tuple[str, str], batch_size: int = 4) -> CodesDataModule:
    return CodesDataModule(*tokens, batch_size=batch_size)


def trainer(*callbacks: Callback, folder: Path | None = None, **options) -> Trainer:
    """On the CPU; with a folder, its curves go to folder/logs and other files into it."""
    if folder is not None:
        logger = TensorBoardLogger(str(folder), name="", version="logs")
        options = {"logger": logger, "default_root_dir": folder} | options
    common = QUIET | dict(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1)
    return Trainer(callbacks=list(callbacks), **common | options)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(Path(folder) / "logs")).Reload()


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a run: name -> step -> value."""
    found = events(folder)
    return {name: {event.step: event.value for event in found.Scalars(name)} for name in found.Tags()["scalars"]}
