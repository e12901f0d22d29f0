"""Identity of weights, and the official checkpoints in our modules."""

import hashlib
import json

import torch
from torch import nn


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's class, config and weights, in hexadecimal.

    The same on every device, and for every dtype that holds the weights' values exactly: they are hashed as float32.

    Args:
        module: a module with a `config`, such as SequentialDiffusionTokenizer or ARModel.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    digest.update(json.dumps(module.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
