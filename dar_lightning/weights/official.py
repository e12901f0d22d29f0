"""Loading the official D-AR weights as our models."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError
from dar_lightning.formats.checkpoint import PickledConfig, Weights, pick_weights, read_checkpoint, takes_ema
from dar_lightning.formats.pretrained import build_model
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights.official_names import (
    AR_NAMES,
    LINEAR_CONVOLUTIONS,
    NOT_WEIGHTS,
    REPA_PREFIX,
    TOKENIZER_NAMES,
    ar_config,
    official_name,
    tokenizer_config,
)

Source = str | Path | Mapping[str, Any]
Model = TypeVar("Model", SequentialDiffusionTokenizer, ARModel)


def load_official_tokenizer(
    source: Source, config: Mapping[str, Any] | None = None, weights: Weights = "auto"
) -> SequentialDiffusionTokenizer:
    """Load an official tokenizer, in float32 and evaluation mode.

    Args:
        source: path of a .pt or .safetensors file, or a state dict or checkpoint that is already read.
        config: the official YAML as a dict, {"model": {...}}; needed where the file carries none.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes EMA where there is one, as the official code.

    Raises:
        UserError: if the file cannot be read safely, if its config and `config` differ or are both absent, or if any
            tensor is unknown, missing, misshapen or not finite. Only the REPA head, which training alone uses, may be
            missing, with a warning.
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
    """Load an official AR model, in float32 and evaluation mode.

    Args:
        source: path of a .pt or .safetensors file, or a state dict or checkpoint that is already read.
        config: the official constructor's arguments, {"dim", "n_layer", "n_head", ...}; None for the released sizes.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes raw where both are there, as the official code.

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
    tensors = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
    for name in LINEAR_CONVOLUTIONS:
        if isinstance(tensors.get(name), Tensor) and tensors[name].shape[2:] == (1, 1):
            tensors[name] = tensors[name][:, :, 0, 0]
    return build_model(model_class, config, tensors, origin, partial(official_name, rules=rules)).float().eval()
