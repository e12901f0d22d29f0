"""SHA-256 of a model: its class, config and weights."""

import hashlib
import json

import torch
from torch import nn

from dar_lightning.formats.pretrained import build_config

# Hyperparameters and weights that leave a trained model's tokens, logits and images as they are.
TRAINING_ONLY = {"repa_layer", "class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"}
REPA_HEAD = "decoder.repa_head."


@torch.no_grad()
def model_sha256(module: nn.Module) -> str:
    """SHA-256 of what a module with a `config` computes, in hexadecimal.

    The same on every device, and for every dtype that holds the weights' values exactly: they are hashed as float32.
    Hyperparameters count where they differ from their defaults, so an option that is added later, off by default,
    changes no older hash; those that only training reads, and the REPA head, never count.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    config = build_config(type(module.config), module.config.to_dict(), "config")
    defaults = type(config)().to_dict()
    values = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    digest.update(json.dumps({n: values[n] for n in sorted(values) if n not in TRAINING_ONLY}, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(REPA_HEAD):
            continue
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
