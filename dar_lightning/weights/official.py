"""Loading the official D-AR weights as our models."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError, require
from dar_lightning.formats.checkpoint import PickledConfig, Weights, pick_weights, read_checkpoint
from dar_lightning.formats.pretrained import build_model
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
            tensor is unknown, missing, misshapen or not finite; the REPA head may be missing, with a warning.
    """
    checkpoint, origin = _read(source)
    state, averaged = pick_weights(checkpoint, weights, prefer_ema=True, origin=origin)
    has_repa_head = any(name.startswith(REPA_PREFIX) for name in state)
    carried = checkpoint.get("config")
    carried = getattr(carried, "_data", None) if isinstance(carried, PickledConfig) else carried
    configs = [tokenizer_config(each, has_repa_head) for each in (config, carried) if each is not None]
    require(configs, f"{origin} carries no config: pass config, the official YAML as a dict {{'model': {{...}}}}")
    if configs[0] != configs[-1]:
        raise UserError(f"{origin} carries a config that differs from the given one: pass none to use the file's")
    if not has_repa_head:
        warnings.warn(f"{origin} has no REPA head: the tokenizer is built without one", stacklevel=2)
    for name in LINEAR_CONVOLUTIONS:
        if isinstance(state.get(name), Tensor) and state[name].shape[2:] == (1, 1):
            state[name] = state[name][:, :, 0, 0]
    return _build(SequentialDiffusionTokenizer, configs[0], state, TOKENIZER_NAMES, origin, averaged)


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
    state, averaged = pick_weights(checkpoint, weights, prefer_ema=False, origin=origin)
    return _build(ARModel, ar_config(config, state), state, AR_NAMES, origin, averaged)


def _read(source: Source) -> tuple[Mapping[str, Any], str]:
    return (source, "state dict") if isinstance(source, Mapping) else (read_checkpoint(source), str(source))


def _build(model_class, config, state: dict[str, Tensor], rules: list, origin: str, averaged: bool | None):
    tensors = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
    model = build_model(model_class, config, tensors, origin, partial(official_name, rules=rules)).float().eval()
    model.averaged = averaged
    return model
