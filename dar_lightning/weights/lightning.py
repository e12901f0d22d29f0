"""Loading the model inside a Lightning checkpoint of `dar fit`, with EMA or raw weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dar_lightning.ar.backbones import merge_lora
from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError, require
from dar_lightning.formats.checkpoint import Weights, read_checkpoint
from dar_lightning.formats.pretrained import build_config, build_model
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

Model = TypeVar("Model", SequentialDiffusionTokenizer, ARModel)
# Attribute of the LightningModule that holds the model -> its class.
PARTS = {"tokenizer": SequentialDiffusionTokenizer, "ar": ARModel}


def load_lightning_checkpoint(ckpt: str | Path, weights: Weights = "auto") -> SequentialDiffusionTokenizer | ARModel:
    """Load the plain model inside a checkpoint of `dar fit`, in evaluation mode; adapters (LoRA) are merged.

    Args:
        ckpt: the .ckpt file.
        weights: "ema", the averaged weights; "raw", those that the optimizer works on; "auto", EMA if the run kept one
            and had begun to average. The model's `averaged` says which these are.

    Raises:
        UserError: if the file cannot be read safely, is no such checkpoint, or has no such weights.
    """
    checkpoint = read_checkpoint(ckpt)
    # EMAWeightAveraging saves the average as "state_dict" and moves the optimizer's weights to "current_model_state".
    keeps_ema, has_ema = "current_model_state" in checkpoint, has_average(checkpoint)
    require(weights != "ema" or has_ema, f"{ckpt} holds no EMA weights (yet): weights is 'ema', need 'raw' or 'auto'")
    raw = keeps_ema and (weights == "raw" or not has_ema)
    part, tensors = split_model(checkpoint, "current_model_state" if raw else "state_dict", ckpt)
    hyperparameters = checkpoint.get("hyper_parameters")
    config = hyperparameters.get("config") if isinstance(hyperparameters, Mapping) else None
    if not isinstance(config, Mapping):
        raise UserError(f"{ckpt} holds no hyper_parameters['config']: it is of no tokenizer or AR training run")
    config = build_config(PARTS[part].config_class, config, ckpt)
    if part == "ar":
        config, tensors = merge_lora(config, tensors)
    model = build_model(PARTS[part], config, tensors, ckpt)
    model.averaged = keeps_ema and not raw
    return model.eval()


def load_model(source: str | Path, model_class: type[Model]) -> Model:
    """Load a model from a checkpoint of `dar fit` (a file), a folder or a Hugging Face repository."""
    if not Path(source).is_file():
        return model_class.from_pretrained(source)
    model = load_lightning_checkpoint(source)
    if not isinstance(model, model_class):
        raise UserError(f"{source} is of a {type(model).__name__}: need one of a {model_class.__name__}")
    return model


def has_average(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's "state_dict" is an EMA after its first update: before, it is the untrained model."""
    state = checkpoint.get("averaging_state")
    count = state.get("n_averaged") if isinstance(state, Mapping) else None
    return "current_model_state" in checkpoint and not (isinstance(count, Tensor) and count.eq(0).all())


def split_model(checkpoint: Mapping[str, Any], key: str, origin: Any) -> tuple[str, dict[str, Tensor]]:
    """Which model a Lightning checkpoint holds, "tokenizer" or "ar", and its tensors, without those of loss networks.

    `key` is where its state dict is; a UserError starts with `origin`.
    """
    state = checkpoint.get(key)
    state = {str(name): tensor for name, tensor in state.items()} if isinstance(state, Mapping) else {}
    for part in PARTS:
        if tensors := {n.removeprefix(f"{part}."): t for n, t in state.items() if n.startswith(f"{part}.")}:
            return part, tensors
    raise UserError(f"{origin} is no checkpoint of a tokenizer or AR training run")
