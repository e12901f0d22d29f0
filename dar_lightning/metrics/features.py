"""Feature networks by name: every one maps uint8 images (B, 3, H, W) to float features (B, D).

A network may say in an attribute `resize` how it brings images to its size; it becomes part of the protocol.
Only Inception's distance is called FID, with any other network it is FD-<name>: they cannot be compared.
torch-fidelity's and timm's networks are used as they are; their weights are read as data, never as code.
"""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from dar_lightning.errors import UserError, one_line
from dar_lightning.files import load_class
from dar_lightning.formats.checkpoint import read_checkpoint
from dar_lightning.metrics.color_edges import ColorEdges


class FrozenNetwork:
    """Holds a network outside of the module tree, so that optimizers, EMA copies and checkpoints do not see it.

    Its weights stay in float32 and its layers compute in the run's precision; in bfloat16 they would save less than
    0.2 GB and round what norms compute with.
    """

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Call the network on the device of the first input."""
        return self.network.to(inputs[0].device)(*inputs)

    def __deepcopy__(self, memo) -> "FrozenNetwork":
        return self


class TimmFeatures(nn.Module):
    """The pooled features of a pretrained timm model: bicubic resize to its input size, its own mean and std."""

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        self.network = timm.create_model(name, pretrained=weights is None, num_classes=0)
        if weights is not None:
            tensors = read_checkpoint(weights)  # its classifier stays behind
            self.network.load_state_dict({key: tensors[key] for key in self.network.state_dict() if key in tensors})
        config = timm.data.resolve_model_data_config(self.network)
        self.input_size = config["input_size"][1:]
        self.resize = f"bicubic to {self.input_size[0]}x{self.input_size[1]}, antialiased"
        _add_normalization(self, config["mean"], config["std"])

    def forward(self, images: Tensor) -> Tensor:
        # Filtered only where it makes an image smaller, as Pillow does.
        pixels = F.interpolate(images.float() / 255, self.input_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((pixels - self.mean) / self.std)


class MobileNetFeatures(nn.Module):
    """The 1280 features of torchvision's MobileNetV2 (see `data/fetch_mobilenet.py`), averaged over the image."""

    resize = "bilinear to 224x224, not antialiased"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        network = torchvision.models.mobilenet_v2(weights="IMAGENET1K_V1" if weights is None else None)
        if weights is not None:
            network.load_state_dict(read_checkpoint(weights))
        self.network = network.features.to(memory_format=torch.channels_last)  # a quarter faster on CPUs
        _add_normalization(self, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def forward(self, images: Tensor) -> Tensor:
        pixels = F.interpolate(images.float() / 255, (224, 224), mode="bilinear", antialias=False)
        return self.network((pixels - self.mean) / self.std).mean(dim=(2, 3))


def _add_normalization(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    network.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
    network.register_buffer("std", torch.tensor(std).view(3, 1, 1))


class InceptionFeatures(nn.Module):
    """The 2048 pooled features of the TensorFlow Inception-v3 that FID is defined with, torch-fidelity's."""

    resize = "bilinear to 299x299 as in TensorFlow 1, not antialiased"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        if weights is None:
            tensors = torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
        else:
            tensors = read_checkpoint(weights)
        # torch-fidelity would run whatever is pickled in a file: it gets one that holds tensors alone, in memory.
        torch.save(tensors, file := io.BytesIO())
        file.seek(0)
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]

    def logits(self, features: Tensor) -> Tensor:
        """(B, 2048) features -> (B, 1008) logits without their bias, which the Inception Score is defined with."""
        return features @ self.network.fc.weight.T


BUILT_IN = {"inception": InceptionFeatures, "mobilenet_v2": MobileNetFeatures, "color_edges": ColorEdges}


def load_features(name: str, weights: str | None = None, option: str = "--features") -> nn.Module:
    """A feature network, frozen and in evaluation mode: uint8 (B, 3, H, W) -> float (B, D).

    Args:
        name: `inception`, `mobilenet_v2`, `color_edges`, a timm model, or the import path of an nn.Module class without
            required arguments (`my_package.Net`; the current folder is searched too).
        weights: a local file of its weights, under its library's names; without it, they are downloaded.
        option: what the user calls the name, for error lines; the file is this and `_weights`.
    """
    if name not in ("inception", "mobilenet_v2") and not timm.is_model(name):
        if weights is not None:
            raise UserError(f"{option}_weights {weights}: {name} is a class, which takes no file")
        network = BUILT_IN[name]() if name in BUILT_IN else _load_class(name, option)()
        return network.eval().requires_grad_(False)
    try:
        network = BUILT_IN[name](weights) if name in BUILT_IN else TimmFeatures(name, weights)
    except UserError:  # the file is missing or broken, and its line names it
        raise
    except ModuleNotFoundError as error:
        needs = "needs torch-fidelity (pip install torch-fidelity)"
        raise UserError(f"{option} inception {needs}; or use mobilenet_v2, color_edges or a timm model") from error
    except Exception as error:  # whatever the download, or timm's, raised; or a file that does not fit
        if weights is not None:
            raise UserError(f"{option}_weights {weights}: does not fit {name} ({one_line(error)})") from error
        missing = f"its pretrained weights are not here and cannot be fetched ({one_line(error)}); connect once"
        raise UserError(f"{option} {name}: {missing}, or give a file of them as {option}_weights") from error
    return network.eval().requires_grad_(False)


def _load_class(path: str, option: str) -> type[nn.Module]:
    found = load_class(path, f"{option} {path}", f"{', '.join(BUILT_IN)}, a timm model or the import path of a class")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{option} {path}: must be a torch.nn.Module class, is {found!r}")
    return found


def frechet_name(features: str) -> str:
    """What a Frechet distance on these features is called: `FID` for Inception alone, else `FD-<features>`."""
    return "FID" if features == "inception" else f"FD-{features}"


def feature_protocol(features: str, network: nn.Module) -> dict[str, Any]:
    """What a metric says of its feature network, for JSON."""
    resize = getattr(network, "resize", "whatever the class does")
    return {"name": features, "sha256": network_sha256(network), "resize": resize}


def network_sha256(network: nn.Module) -> str:
    """SHA-256 of a network's class, parameters and buffers: networks with equal ones give comparable features."""
    digest = hashlib.sha256(type(network).__qualname__.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
