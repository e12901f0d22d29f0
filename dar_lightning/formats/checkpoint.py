"""Reading .pt, .ckpt and .safetensors checkpoints safely: tensors and plain values, no code.

Pickles are read by torch's restricted unpickler (weights_only) alone. The official D-AR files pickle two classes beside
their tensors; they are admitted by name, as inert stand-ins.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dar_lightning.errors import UserError, one_line, require
from dar_lightning.formats.pretrained import read_safetensors

Weights = Literal["auto", "ema", "raw"]

# Inert stand-ins, attributes only; torch matches them by name. The official config is a mapping in `_data`.
PickledNamespace = type("Namespace", (), {"__module__": "argparse"})
PickledConfig = type("Config", (), {"__module__": "config_util"})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a .safetensors, .pt, .pth or .ckpt file, with its tensors on the CPU.

    Raises:
        UserError: if the file is missing, broken, no dictionary, or names anything but tensors, plain values and the
            two stand-ins.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    require(path.is_file(), f"{path} is missing: need a .safetensors, .pt or .ckpt file")
    admitted = torch.serialization.safe_globals([PickledNamespace, PickledConfig])
    try:
        # The unpickler remarks on unusual files; the error, if there is one, says it better.
        with admitted, warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise anything at all
        # Torch's message explains at length how to run the file's code after all.
        reason = one_line(error)
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it names {refused[1]}, and only tensors and plain values are loaded"
        elif found := re.search(r"WeightsUnpickler error: (.*)", str(error)):
            reason = f"not a plain checkpoint ({found[1].strip()})"
        raise UserError(f"cannot read {path}: {reason}") from error
    require(isinstance(checkpoint, dict), f"{path} holds a {type(checkpoint).__name__}: need a dictionary of weights")
    return checkpoint


def pick_weights(
    checkpoint: Mapping[str, Any], weights: Weights, prefer_ema: bool, origin: Any
) -> tuple[dict[str, Tensor], bool | None]:
    """The state dict of a bare or a training checkpoint, without the prefixes of torch.compile and DDP.

    Training checkpoints have "model", "module" (DeepSpeed) or "state_dict", and may have "ema"; of both, `prefer_ema`
    says what "auto" takes. Returned with it: whether these are EMA weights; None where the file does not tell what its
    only weights are. UserError, which starts with `origin`, if the file has no such weights.
    """
    states = {name: state for name, state in checkpoint.items() if isinstance(state, Mapping)}
    ema, raw = states.get("ema"), next((states[n] for n in ("model", "module", "state_dict") if n in states), None)
    if weights == "ema" and ema is None:
        names = ", ".join(str(name) for name in checkpoint)[:200]
        raise UserError(f"{origin} holds no EMA weights: weights is 'ema', the file has {names}")
    if weights == "raw" and ema is not None and raw is None:
        raise UserError(f"{origin} holds only EMA weights: weights is 'raw'")
    averaged = None if ema is None else weights == "ema" or (weights == "auto" and (prefer_ema or raw is None))
    state = ema if averaged else checkpoint if raw is None else raw
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in state.items()}, averaged
