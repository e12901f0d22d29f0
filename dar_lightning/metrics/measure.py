"""Feature statistics of a set of images in one pass, with checks of the set."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dar_lightning.errors import UserError, require
from dar_lightning.metrics.frechet import FeatureStatistics, Gaussian
from dar_lightning.metrics.images import ImageSet, with_progress
from dar_lightning.records.pixels import image_digests, set_sha256


class Measured:
    """A set of images, reduced as it arrives in batches; each rank may have a share of it.

    Args:
        network: uint8 (B, 3, H, W) on the device -> (B, D).
        device: where to compute features. Statistics are there too, unless it has no float64.
    """

    size: tuple[int, int]  # (H, W)
    features: Tensor | None = None  # (n, D) float32, if they were to be kept
    labels: Tensor | None = None  # (n,) int64, if features are kept and the set has labels

    def __init__(self, network: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self.network, self.device = network, device
        self.digests: dict[int, bytes] = {}  # of the pixels of numbered images
        self._sums: FeatureStatistics | None = None

    def add(self, images: Tensor, numbers: Sequence[int] = (), count: int | None = None) -> Tensor:
        """Add the first `count` (None: all) of images (B, 3, H, W) uint8, B > 0; returns the features of all, (B, D).

        All ranks must add something, if only with a count of 0, before they put their shares together.
        """
        features = self.network(images.to(self.device))
        if features.shape[:-1] != images.shape[:1]:
            given = f"gave {tuple(features.shape)} for B = {len(images)}"
            raise UserError(f"features: the network must give (B, D) features, {given}")
        self._sums = self._sums or FeatureStatistics(features.shape[1]).to(float64_device(self.device))
        self._sums.update(features[:count].to(self._sums.device))
        if numbers:
            digests = image_digests(images[:count].permute(0, 2, 3, 1).cpu().numpy())
            self.digests.update(zip(numbers, digests, strict=True))
        return features

    @property
    def empty(self) -> bool:
        """Whether nothing has been added."""
        return self._sums is None

    @property
    def statistics(self) -> Gaussian:
        """Of the features of all ranks' shares, on the CPU, where stored ones are."""
        mean, covariance, count = self._sums.compute()
        return Gaussian(mean.cpu(), covariance.cpu(), count)

    @property
    def sha256(self) -> str:
        """Of all ranks' pixels, in order: equal for equal sets, wherever they lie (`records.pixels`)."""
        shares = [self.digests]
        if dist.is_initialized():
            dist.all_gather_object(shares := [None] * dist.get_world_size(), self.digests)
        return set_sha256(digest for _, digest in sorted(pair for share in shares for pair in share.items()))


@torch.no_grad()
def measure(
    images: ImageSet,
    option: str,
    network: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int,
    keep: bool = False,
    size: tuple[int, int] | None = None,
    unique: bool = False,
) -> Measured:
    """Read a set of 2 images or more once, in batches; network and device as for `Measured`.

    Args:
        images: the set.
        option: what the user calls it, for error lines.
        network: of the features.
        device: of the features.
        batch_size: images at a time.
        keep: keep features and labels; nothing else is kept of an image.
        size: the (H, W) that images must have; None takes any.
        unique: refuse a set that has an image twice.
    """
    require(len(images) >= 2, f"{option}: {len(images)} image(s); a Frechet distance needs 2 or more on each side")
    measured, brightest, places, kept = Measured(network, device), 0, {}, []
    for pixels, labels in with_progress(images, batch_size, option):
        measured.size = size = size or tuple(pixels.shape[2:])
        if tuple(pixels.shape[2:]) != size:
            found, wanted = (f"{height}x{width}" for height, width in (pixels.shape[2:], size))
            raise UserError(f"{option}: images of {found}, those of --reference have {wanted}; bring them to one size")
        brightest = max(brightest, int(pixels.max()))
        numbers = range(len(measured.digests), len(measured.digests) + len(pixels))
        features = measured.add(pixels, numbers)
        for number in numbers:
            if (first := places.setdefault(measured.digests[number], number)) < number and unique:
                raise UserError(
                    f"{option}: has an image twice, numbers {first} and {number}; were samples of one seed put "
                    "together? --allow_duplicates takes them as they are"
                )
        if keep:
            kept.append((features.cpu(), labels))
    require(brightest > 1, f"{option}: no value is above {brightest}; pixels must be 0 to 255")
    if keep:
        features, labels = zip(*kept, strict=True)
        measured.features, measured.labels = torch.cat(features), None if labels[0] is None else torch.cat(labels)
    return measured


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for Apple's, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
