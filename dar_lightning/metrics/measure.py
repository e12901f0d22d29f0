"""Feature statistics of a set of images in one pass, with checks of the set."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError
from dar_lightning.metrics.frechet import FeatureStatistics, Gaussian
from dar_lightning.metrics.image_set import ImageSet, with_progress
from dar_lightning.records.pixels import image_digests, set_sha256


class Measured(NamedTuple):
    """A set of images, reduced."""

    statistics: Gaussian  # of the features
    size: tuple[int, int]  # (H, W)
    sha256: str  # of all pixels, in order: equal for equal sets, wherever they lie (`records.pixels`)
    features: Tensor | None  # (n, D) float32, if they were to be kept
    labels: Tensor | None  # (n,) int64, if features are kept and the set has labels


@torch.no_grad()
def measure(
    images: ImageSet,
    option: str,
    network: nn.Module,
    device: torch.device,
    batch_size: int,
    keep: bool = False,
    size: tuple[int, int] | None = None,
    unique: bool = False,
) -> Measured:
    """Read a set once, in batches; what is kept of an image is its features at most.

    Args:
        images: the set, of 2 images or more, with values from 0 to 255.
        option: what the user calls it, for error lines.
        network: uint8 (B, 3, H, W) -> (B, D), on the device.
        device: where to compute features. Statistics are there too, unless it has no float64.
        batch_size: images at a time.
        keep: keep features and labels.
        size: the (H, W) that images must have; None takes any.
        unique: refuse a set that has an image twice.
    """
    if len(images) < 2:
        raise UserError(f"{option}: {len(images)} image(s); a Frechet distance needs 2 or more on each side")
    statistics, brightest, kept, all_labels = None, 0, [], []
    digests, places = [], {}
    for pixels, labels in with_progress(images, batch_size, option):
        size = size or tuple(pixels.shape[2:])
        if tuple(pixels.shape[2:]) != size:
            raise UserError(
                f"{option}: images of {pixels.shape[2]}x{pixels.shape[3]}, those of --reference have "
                f"{size[0]}x{size[1]}; bring them to one size"
            )
        brightest = max(brightest, int(pixels.max()))
        for digest in image_digests(pixels.permute(0, 2, 3, 1).numpy()):
            number = len(digests)
            if unique and (first := places.setdefault(digest, number)) < number:
                raise UserError(
                    f"{option}: has an image twice, numbers {first} and {number}; were samples of one seed put "
                    "together? --allow_duplicates takes them as they are"
                )
            digests.append(digest)
        values = network(pixels.to(device))
        if values.shape[:-1] != pixels.shape[:1]:
            raise UserError(
                f"--features: the network must give (B, D) features, gave {tuple(values.shape)} for B = {len(pixels)}"
            )
        if statistics is None:
            statistics = FeatureStatistics(values.shape[1]).to(float64_device(device))
        statistics.update(values.to(statistics.device))
        if keep:
            kept.append(values.cpu())
            all_labels.append(labels)
    if brightest <= 1:
        raise UserError(f"{option}: no value is above {brightest}; pixels must be 0 to 255")
    gaussian = statistics.compute()
    labelled = keep and all_labels[0] is not None
    return Measured(
        Gaussian(gaussian.mean.cpu(), gaussian.covariance.cpu(), gaussian.count),
        size,
        set_sha256(digests),
        torch.cat(kept) if keep else None,
        torch.cat(all_labels) if labelled else None,
    )


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for Apple's, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
