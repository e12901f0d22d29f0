"""Reconstructions of images, and their PSNR, SSIM and LPIPS on the 8-bit images that a viewer would see.

Each of the three is torchmetrics' own, image by image; the mean over images is the caller's.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dar_lightning.data.transforms import to_float, to_uint8
from dar_lightning.generation.drawing import image_generator
from dar_lightning.metrics.features import network_sha256
from dar_lightning.metrics.frozen import FrozenNetwork
from dar_lightning.metrics.image_set import ImageSet, with_progress
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

# Recorded beside every value: they change with each of these choices.
PROTOCOL = {
    "images": "uint8",
    "data_range": 255,
    "psnr": "mean over images, each over all pixels and channels",
    "ssim": "mean over images, Gaussian window 11x11, sigma 1.5, each RGB channel, borders reflected and counted",
}
LPIPS_PROTOCOL = "VGG16, version 0.1 heads, images in [-1, 1] at their own size, mean over images"


class Reconstructed(NamedTuple):
    """A batch of images, and what a tokenizer made of it."""

    numbers: Sequence[int]  # of the images in their set
    images: Tensor  # (B, 3, H, W) uint8
    codes: Tensor  # (B, N) int64
    decoded: Tensor  # (B, 3, H, W) uint8; or all previews, (B, K, 3, H, W)


@torch.no_grad()
def reconstruct(
    tokenizer: SequentialDiffusionTokenizer,
    images: Tensor,
    numbers: Sequence[int],
    seed: int,
    previews: bool = False,
    **options: Any,
) -> Reconstructed:
    """Encode and decode a batch of uint8 images (B, 3, H, W); an image's noise depends on (seed, its number) alone.

    `options` are those of `tokenizer.detokenize` or, for previews, `tokenizer.previews`: solver, num_steps, groups.
    """
    noise = tokenizer.draw_noise(len(images), [image_generator(seed, number) for number in numbers], images.shape[2:])
    codes = tokenizer.tokenize(to_float(images))
    decode = tokenizer.previews if previews else tokenizer.detokenize
    return Reconstructed(numbers, images, codes, to_uint8(decode(codes, noise, **options)))


def reconstruct_all(
    tokenizer: SequentialDiffusionTokenizer, images: ImageSet, batch_size: int, seed: int, **options: Any
) -> Iterator[Reconstructed]:
    """Encode and decode a set of images in batches, in order, with a progress bar; see `reconstruct`."""
    start, device = 0, next(tokenizer.parameters()).device
    for batch, _ in with_progress(images, batch_size, "reconstruct"):
        numbers = range(start, start := start + len(batch))
        yield reconstruct(tokenizer, batch.to(device), numbers, seed, **options)


def reconstruction_scores(
    reconstructions: Tensor, originals: Tensor, lpips: FrozenNetwork | None = None
) -> dict[str, Tensor]:
    """PSNR (dB), SSIM and, with `lpips_network`, LPIPS of each pair of uint8 images (B, 3, H, W): (B,) each.

    SSIM's window needs H, W >= 11, LPIPS 32.
    """
    pair = reconstructions.float(), originals.float()
    scores = {
        "psnr": peak_signal_noise_ratio(*pair, data_range=255.0, reduction="none", dim=(1, 2, 3)),
        "ssim": structural_similarity_index_measure(*pair, data_range=255.0, reduction="none"),
    }
    if lpips is not None:
        with torch.no_grad():
            scores["lpips"] = lpips(to_float(reconstructions), to_float(originals))
    return scores


def mean_scores(batches: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Means over all pairs, for JSON, which cannot hold the infinite PSNR of identical images: None."""
    means = {name: torch.cat([scores[name] for scores in batches]).cpu().double().mean() for name in batches[0]}
    return {name: mean.item() if mean.isfinite() else None for name, mean in means.items()}


def reconstruction_protocol(lpips: FrozenNetwork | None = None) -> dict[str, Any]:
    """What `reconstruction_scores` depend on, for JSON."""
    return PROTOCOL | (
        {} if lpips is None else {"lpips": LPIPS_PROTOCOL, "lpips_sha256": network_sha256(lpips.network)}
    )
