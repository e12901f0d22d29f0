"""`dar export`: the model inside a Lightning checkpoint becomes a folder in our format."""

from pathlib import Path
from typing import Literal

from dar_lightning.ar.model import ARModel
from dar_lightning.checkpoint import read_checkpoint
from dar_lightning.errors import UserError
from dar_lightning.pretrained import build_config, load_tensors
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import fingerprint

# Attribute of the LightningModule that holds the model -> its class.
PARTS = {"tokenizer": SequentialDiffusionTokenizer, "ar": ARModel}


def export(ckpt: Path, output: Path, weights: Literal["auto", "ema", "raw"] = "auto") -> None:
    """Write the tokenizer or the AR model of a training checkpoint in our format.

    Args:
        ckpt: a checkpoint of `dar fit`.
        output: folder for config.json and model.safetensors.
        weights: "ema", the averaged weights; "raw", those that the optimizer works on; "auto", EMA if the run kept one.
    """
    model = load_lightning_checkpoint(ckpt, weights)
    model.save_pretrained(output)
    print(f"{output}: {type(model).__name__}, fingerprint {fingerprint(model)[:12]}")


def load_lightning_checkpoint(
    ckpt: Path, weights: Literal["auto", "ema", "raw"] = "auto"
) -> SequentialDiffusionTokenizer | ARModel:
    """The plain model inside a Lightning checkpoint, in evaluation mode. Arguments and errors as in export."""
    checkpoint = read_checkpoint(ckpt)
    # EMAWeightAveraging saves the average as "state_dict" and moves the optimizer's weights to "current_model_state".
    has_ema = "current_model_state" in checkpoint
    if weights == "ema" and not has_ema:
        raise UserError(f"{ckpt} holds no EMA weights: weights is 'ema', need 'raw' or 'auto'")
    state = checkpoint.get("current_model_state" if weights == "raw" and has_ema else "state_dict")
    config = (checkpoint.get("hyper_parameters") or {}).get("config")
    part = next((name for name in PARTS if any(str(key).startswith(f"{name}.") for key in state or {})), None)
    if part is None or not isinstance(config, dict):
        raise UserError(f"{ckpt} is no checkpoint of a tokenizer or AR training run")
    model_class = PARTS[part]
    model = model_class(build_config(model_class.config_class, config, ckpt))
    # Beside the model, the LightningModule may hold networks of its losses.
    tensors = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    load_tensors(model, tensors, ckpt)
    return model.eval()
