"""Weights from elsewhere into our modules, and what identifies weights."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.checkpoint import PickledConfig, Weights, pick_weights, read_checkpoint, takes_ema
from dar_lightning.errors import UserError
from dar_lightning.official import (
    AR_NAMES,
    NOT_WEIGHTS,
    REPA_PREFIX,
    TOKENIZER_NAMES,
    ar_config,
    official_name,
    tokenizer_config,
)
from dar_lightning.pretrained import build_config, load_tensors, outline
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

Source = str | Path | Mapping[str, Any]
Model = TypeVar("Model", SequentialDiffusionTokenizer, ARModel)


def load_official_tokenizer(
    source: Source, config: Mapping[str, Any] | None = None, weights: Weights = "auto"
) -> SequentialDiffusionTokenizer:
    """The official implementation's tokenizer, in ours.

    Args:
        source: path of a .pt or .safetensors file, or a state dict or checkpoint that is already read.
        config: the official YAML as a dict, {"model": {...}}; needed where the file carries none.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes EMA where there is one, as the official code.

    Returns:
        The model in evaluation mode, float32. A file without any tensor of the REPA head, which only training uses,
        gives a model without that head, and a warning.

    Raises:
        UserError: if the file cannot be read safely, if its config and `config` differ or are both absent, or if any
            tensor is unknown, missing, misshapen or not finite.
    """
    checkpoint, origin = _read(source)
    state = pick_weights(checkpoint, weights, prefer_ema=True, origin=origin)
    carried = _carried_config(checkpoint)
    if carried is None and config is None:
        raise UserError(f"{origin} carries no config: pass config, the official YAML as a dict {{'model': {{...}}}}")
    has_repa_head = any(name.startswith(REPA_PREFIX) for name in state)
    ours = tokenizer_config(carried if config is None else config, has_repa_head)
    if carried is not None and config is not None and tokenizer_config(carried, has_repa_head) != ours:
        raise UserError(f"{origin} carries a config that differs from the given one: pass none to use the file's")
    if not has_repa_head:
        warnings.warn(f"{origin} has no REPA head: the tokenizer is built without one", stacklevel=2)
    model = _convert(SequentialDiffusionTokenizer, ours, state, TOKENIZER_NAMES, origin)
    model.averaged = takes_ema(checkpoint, weights, prefer_ema=True)
    return model


def load_official_ar(source: Source, config: Mapping[str, Any] | None = None, weights: Weights = "auto") -> ARModel:
    """The official implementation's AR model, in ours.

    Args:
        source: path of a .pt or .safetensors file, or a state dict or checkpoint that is already read.
        config: the official constructor's arguments, {"dim", "n_layer", "n_head", ...}; None for the released sizes.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes raw where both are there, as the official code.

    Returns:
        The model in evaluation mode, float32.

    Raises:
        UserError: if the file cannot be read safely, if heads are neither given nor those of a released size, or if
            any tensor is unknown, missing, misshapen or not finite.
    """
    checkpoint, origin = _read(source)
    state = pick_weights(checkpoint, weights, prefer_ema=False, origin=origin)
    model = _convert(ARModel, ar_config(config, state), state, AR_NAMES, origin)
    model.averaged = takes_ema(checkpoint, weights, prefer_ema=False)
    return model


def _read(source: Source) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, Mapping):
        return source, "state dict"
    return read_checkpoint(source), str(source)


def _carried_config(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    config = checkpoint.get("config")
    return getattr(config, "_data", None) if isinstance(config, PickledConfig) else config


def _convert(model_class: type[Model], config: TokenizerConfig | ARConfig, state, rules, origin: str) -> Model:
    model = outline(model_class, config, state, origin)
    theirs = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
    names = {name: official_name(name, rules) for name in model.state_dict()}
    ours = {}
    for name, wanted in model.state_dict().items():
        tensor = theirs.pop(names[name], None)
        if isinstance(tensor, Tensor):
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            # 1x1 convolutions there are linear layers here.
            if tensor.shape == (*wanted.shape, 1, 1):
                tensor = tensor[:, :, 0, 0]
        if tensor is not None:
            ours[name] = tensor
    load_tensors(model, ours | theirs, origin, names)
    return model.eval()


# ---- checkpoints of our own training runs

# Attribute of the LightningModule that holds the model -> its class.
PARTS = {"tokenizer": SequentialDiffusionTokenizer, "ar": ARModel}


def load_lightning_checkpoint(ckpt: str | Path, weights: Weights = "auto") -> SequentialDiffusionTokenizer | ARModel:
    """The plain model inside a checkpoint of `dar fit`.

    Args:
        ckpt: the .ckpt file.
        weights: "ema", the averaged weights; "raw", those that the optimizer works on; "auto", EMA if the run kept one
            and had begun to average.

    Returns:
        The model in evaluation mode; its `averaged` says whether these are EMA weights.

    Raises:
        UserError: if the file cannot be read safely, is no such checkpoint, or has no such weights.
    """
    checkpoint = read_checkpoint(ckpt)
    # EMAWeightAveraging saves the average as "state_dict" and moves the optimizer's weights to "current_model_state".
    keeps_ema, has_ema = "current_model_state" in checkpoint, has_average(checkpoint)
    if weights == "ema" and not has_ema:
        raise UserError(f"{ckpt} holds no EMA weights (yet): weights is 'ema', need 'raw' or 'auto'")
    raw = keeps_ema and (weights == "raw" or not has_ema)
    part, tensors = split_model(checkpoint, "current_model_state" if raw else "state_dict", ckpt)
    hyperparameters = checkpoint.get("hyper_parameters")
    config = hyperparameters.get("config") if isinstance(hyperparameters, Mapping) else None
    if not isinstance(config, Mapping):
        raise UserError(f"{ckpt} holds no hyper_parameters['config']: it is of no tokenizer or AR training run")
    model = outline(PARTS[part], build_config(PARTS[part].config_class, config, ckpt), tensors, ckpt)
    load_tensors(model, tensors, ckpt)
    model.averaged = keeps_ema and not raw
    return model.eval()


def load_model(source: str | Path, model_class: type[Model]) -> Model:
    """A model from a checkpoint of `dar fit` (a file), a folder or a Hugging Face repository.

    Raises:
        UserError: if it cannot be read, or is a model of another kind.
    """
    if not Path(source).is_file():
        return model_class.from_pretrained(source)
    model = load_lightning_checkpoint(source)
    if not isinstance(model, model_class):
        raise UserError(f"{source} is of a {type(model).__name__}: need one of a {model_class.__name__}")
    return model


def has_average(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's "state_dict" is an average of weights, one that had begun.

    Until its first update, Lightning's average is the model before training.
    """
    state = checkpoint.get("averaging_state")
    count = state.get("n_averaged") if isinstance(state, Mapping) else None
    never = isinstance(count, Tensor) and count.numel() == 1 and count.item() == 0
    return "current_model_state" in checkpoint and not never


def split_model(checkpoint: Mapping[str, Any], key: str, origin: Any) -> tuple[str, dict[str, Tensor]]:
    """Which part a Lightning checkpoint holds, "tokenizer" or "ar", and that model's own tensors.

    Beside the model, a LightningModule may hold networks of its losses: they stay behind.

    Args:
        checkpoint: from read_checkpoint.
        key: where its state dict is.
        origin: file or words that an error message starts with.

    Raises:
        UserError: if it holds neither part.
    """
    state = checkpoint.get(key)
    names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
    for part in PARTS:
        tensors = {name.removeprefix(f"{part}."): state[name] for name in names if name.startswith(f"{part}.")}
        if tensors:
            return part, tensors
    raise UserError(f"{origin} is no checkpoint of a tokenizer or AR training run")


# ---- identity

# Hyperparameters and weights that leave a trained model's tokens, logits and images as they are.
TRAINING_ONLY = {"repa_layer", "class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"}
REPA_HEAD = "decoder.repa_head."


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """SHA-256 of what a module computes: its class, config and weights, in hexadecimal.

    The same on every device, and for every dtype that holds the weights' values exactly: they are hashed as float32.
    Hyperparameters count where they differ from their defaults, so an option that is added later, off by default,
    changes no older fingerprint; those that only training reads, and the REPA head, never count.

    Args:
        module: a module with a `config`, such as SequentialDiffusionTokenizer or ARModel.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    config = build_config(type(module.config), module.config.to_dict(), "config")
    defaults = type(config)().to_dict()
    values = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    digest.update(json.dumps({n: values[n] for n in sorted(values) if n not in TRAINING_ONLY}).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(REPA_HEAD):
            continue
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
