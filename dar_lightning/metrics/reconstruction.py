"""PSNR, SSIM and LPIPS of reconstructions, on the 8-bit images that a viewer would see."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from dar_lightning.data.transforms import to_float
from dar_lightning.metrics.features import fingerprint
from dar_lightning.metrics.frozen import FrozenNetwork
from dar_lightning.metrics.lpips import lpips_network

# Recorded beside every value: the figures change with each of these choices.
RECONSTRUCTION_PROTOCOL = {
    "images": "uint8",
    "data_range": 255,
    "psnr": "mean over images, each over all pixels and channels",
    "ssim": "mean over images, Gaussian window 11x11, sigma 1.5, each RGB channel, borders reflected and counted",
}
LPIPS_PROTOCOL = "VGG16, version 0.1 heads, images in [-1, 1] at their own size, mean over images"


class Lpips(Metric):
    """Mean LPIPS over images.

    Args:
        network: from `load_lpips`; it is no part of the metric's state.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, network: FrozenNetwork) -> None:
        super().__init__()
        self.network = network
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, reconstructions: Tensor, originals: Tensor) -> None:
        """Adds pairs (B, 3, H, W), values 0 to 255, H, W >= 32."""
        self.total += self.network(to_float(reconstructions), to_float(originals)).double().sum()
        self.count += len(originals)

    def compute(self) -> Tensor:
        """The mean over all pairs."""
        return self.total / self.count


def load_lpips(weights: str) -> FrozenNetwork:
    """LPIPS's network.

    Args:
        weights: a file of torchvision's VGG16 (`data/convert_vgg16.py` makes one), or "download".

    Raises:
        UserError: the file is no VGG16, or the download fails.
    """
    return lpips_network(None if weights == "download" else weights)


def reconstruction_protocol(lpips: FrozenNetwork | None = None) -> dict[str, Any]:
    """What the figures of reconstruction_metrics(lpips) depend on, for JSON."""
    if lpips is None:
        return dict(RECONSTRUCTION_PROTOCOL)
    return RECONSTRUCTION_PROTOCOL | {"lpips": LPIPS_PROTOCOL, "lpips_sha256": fingerprint(lpips.network)}


def as_figures(values: dict[str, Tensor]) -> dict[str, float | None]:
    """Scalars for JSON, which cannot hold the infinite PSNR of identical images: None."""
    return {name: value.item() if value.isfinite() else None for name, value in values.items()}


def reconstruction_metrics(lpips: FrozenNetwork | None = None) -> MetricCollection:
    """PSNR (dB), SSIM and, with its network, LPIPS.

    Returns:
        A collection whose `update(reconstructions, originals)` takes two uint8 tensors (B, 3, H, W) converted by
        `.float()`, values 0 to 255, and whose `compute()` returns {"psnr", "ssim"} and maybe "lpips". SSIM's window
        needs H, W >= 11, LPIPS 32.
    """
    metrics: dict[str, Metric] = {
        "psnr": PeakSignalNoiseRatio(data_range=255.0, reduction="elementwise_mean", dim=(1, 2, 3)),
        "ssim": StructuralSimilarityIndexMeasure(data_range=255.0),
    }
    if lpips is not None:
        metrics["lpips"] = Lpips(lpips)
    return MetricCollection(metrics, compute_groups=False)
