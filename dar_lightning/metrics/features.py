"""Feature networks by name: every one maps uint8 images (B, 3, H, W) to float features (B, D).

A network may say in an attribute `resize` how it brings images to its size; it becomes part of the protocol.
Only Inception's number is called FID. With any other network it is called FD-<name>: values of different networks
cannot be compared.
"""

import hashlib
import importlib
import os
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dar_lightning.errors import UserError
from dar_lightning.metrics.color_edges import ColorEdges


class TimmFeatures(nn.Module):
    """The pooled features of a pretrained timm model: bicubic resize to its input size, its own mean and std.

    Args:
        name: a timm model's name, with or without its pretrained tag.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = timm.create_model(name, pretrained=True, num_classes=0)
        config = timm.data.resolve_model_data_config(self.network)
        self.input_size = config["input_size"][1:]
        self.resize = f"bicubic to {self.input_size[0]}x{self.input_size[1]}, antialiased"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        # Filtered only where it makes an image smaller, as Pillow does.
        pixels = F.interpolate(pixels, self.input_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((pixels - self.mean) / self.std)


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the TensorFlow Inception-v3 that FID is defined with, through torch-fidelity.

    It resizes to 299x299 itself as TensorFlow 1 did: bilinear, no antialiasing.
    """

    resize = "bilinear to 299x299 as in TensorFlow 1, no antialiasing"

    def __init__(self) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def load_features(name: str) -> nn.Module:
    """Builds a feature network, frozen and in evaluation mode.

    Args:
        name: `inception`, `color_edges`, a timm model, or the import path of an nn.Module class without required
            arguments (`my_package.Net`; the current folder is searched too).

    Returns:
        A module that maps uint8 (B, 3, H, W) to float (B, D).

    Raises:
        UserError: the name is none of these, or the pretrained weights are not here and cannot be fetched.
    """
    if name == "inception":
        network = _load_inception()
    elif name == "color_edges":
        network = ColorEdges()
    elif timm.is_model(name):
        try:
            network = TimmFeatures(name)
        except Exception as error:  # timm raises whatever its download raised
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--features {name}: timm could not load its pretrained weights ({reason}); "
                "connect once to fetch them, or use color_edges, which has none"
            ) from error
    else:
        network = _load_class(name)()
    return network.eval().requires_grad_(False)


def _load_inception() -> nn.Module:
    try:
        return InceptionFeatures()
    except ModuleNotFoundError as error:
        raise UserError(
            "--features inception needs the package torch-fidelity (pip install torch-fidelity); "
            "or use color_edges or a timm model"
        ) from error
    except OSError as error:  # urllib's errors too
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(
            f"--features inception: its weights are not in {folder} and could not be fetched ({error}); "
            "copy weights-inception-2015-12-05-6726825d.pth there, or use color_edges or a timm model"
        ) from error


def _load_class(path: str) -> type[nn.Module]:
    module_name, _, class_name = path.rpartition(".")
    if os.getcwd() not in sys.path:  # as with `python -m`
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--features {path}: not inception, color_edges, a timm model or the import path of a class ({error})"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"--features {path}: must be a torch.nn.Module class, is {found!r}")
    return found


def frechet_name(features: str) -> str:
    """What a Frechet distance on these features is called: `FID` for Inception alone, else `FD-<features>`."""
    return "FID" if features == "inception" else f"FD-{features}"


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over a network's class, parameters and buffers: equal fingerprints mean comparable features."""
    digest = hashlib.sha256(type(network).__qualname__.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
