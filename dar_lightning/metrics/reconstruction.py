"""Reconstructions of images, and what is measured of them on the 8-bit images that a viewer would see.

PSNR, SSIM and LPIPS are torchmetrics' own, image by image; the mean over images is the caller's. Token influence says
how much the tokens, and how much the noise, decide the decoded image, as PSNRs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dar_lightning.data.transforms import to_float, to_uint8
from dar_lightning.generation.drawing import image_generator
from dar_lightning.metrics.features import FrozenNetwork, network_sha256
from dar_lightning.metrics.images import ImageSet, with_progress
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

# Recorded beside every value: they change with each of these choices.
PROTOCOL = {
    "images": "uint8",
    "data_range": 255,
    "psnr": "mean over images, each over all pixels and channels",
    "ssim": "mean over images, Gaussian window 11x11, sigma 1.5, each RGB channel, borders reflected and counted",
}
LPIPS_PROTOCOL = "VGG16, version 0.1 heads, images in [-1, 1] at their own size, mean over images"
TOKEN_INFLUENCE_PROTOCOL = {
    "psnr": "of 8-bit decodings, data range 255, mean over images; identical ones as if a single value differed by 1",
    "other_tokens": "of the next of these images, for the last one those of the first",
    "other_noise": "the second draw of the image's generator, whose first one is the noise",
}


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


def image_psnr(images: Tensor, others: Tensor) -> Tensor:
    """PSNR (dB) of each pair of uint8 images (..., 3, H, W): (...); infinite for identical ones."""
    return peak_signal_noise_ratio(images.float(), others.float(), data_range=255.0, reduction="none", dim=(-3, -2, -1))


def finite_psnr(images: Tensor, others: Tensor) -> Tensor:
    """The same, of identical ones as if a single value differed by 1, so that means stay finite."""
    return image_psnr(images, others).clamp(max=10 * math.log10(255**2 * math.prod(images.shape[-3:])))


def reconstruction_scores(
    reconstructions: Tensor, originals: Tensor, lpips: FrozenNetwork | None = None
) -> dict[str, Tensor]:
    """PSNR (dB), SSIM and, with `lpips_network`, LPIPS of each pair of uint8 images (B, 3, H, W): (B,) each.

    SSIM's window needs H, W >= 11, LPIPS 32.
    """
    pair = reconstructions.float(), originals.float()
    ssim = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
    scores = {"psnr": image_psnr(reconstructions, originals), "ssim": ssim}
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
    return PROTOCOL | ({"lpips": LPIPS_PROTOCOL, "lpips_sha256": network_sha256(lpips.network)} if lpips else {})


def token_influence_names(num_groups: int) -> list[str]:
    """Names of the columns of `token_influence`."""
    exchanged = [f"psnr_exchanged_from_group_{m}" for m in _exchanged_groups(num_groups)]
    return ["psnr_own_tokens", "psnr_other_tokens", "psnr_same_tokens", *exchanged]


def _exchanged_groups(num_groups: int) -> list[int]:
    """Groups, from 1, from which on tokens are exchanged: the first, the second, and the first of the later half."""
    return sorted(m for m in {1, 2, num_groups // 2 + 1} if m <= num_groups)


@torch.no_grad()
def token_influence(
    tokenizer: SequentialDiffusionTokenizer,
    images: Tensor,
    codes: Tensor,
    others: Tensor,
    generators: list[torch.Generator],
    solver: str = "adams2",
    num_steps: int | None = None,
) -> Tensor:
    """PSNRs (dB) that say what tokens decide, image by image: (B, columns) of `token_influence_names`.

    They are of the image against its decoding from its own tokens, and from the others'; of its decoding against that
    of the same tokens from other noise; and against those from the same noise with the others' tokens from group m on.

    Args:
        tokenizer: what decodes.
        images: (B, 3, H, W) uint8.
        codes: (B, N) their tokens.
        others: (B, N) tokens of other images.
        generators: one per image; it draws the noise first, then the other noise.
        solver: see `tokenizer.flow.integrate`.
        num_steps: diffusion steps; None is one per group of tokens.
    """
    noise, other_noise = (tokenizer.draw_noise(len(images), generators, images.shape[2:]) for _ in range(2))

    def decode(codes: Tensor, noise: Tensor) -> Tensor:
        return to_uint8(tokenizer.detokenize(codes, noise, solver, num_steps=num_steps))

    num_groups = tokenizer.config.num_groups
    firsts = [(m - 1) * codes.shape[1] // num_groups for m in _exchanged_groups(num_groups)]  # tokens
    exchanged = [decode(torch.cat([codes[:, :first], others[:, first:]], dim=1), noise) for first in firsts]
    own = decode(codes, noise)
    pairs = [(own, images), (exchanged[0], images), (decode(codes, other_noise), own)]
    return torch.stack([finite_psnr(*pair) for pair in [*pairs, *((one, own) for one in exchanged)]], dim=1)


def radial_spectrum(images: Tensor) -> Tensor:
    """Mean power of images (..., C, S, S) at 1, 2, ..., S // 2 cycles per image, over directions: (..., S // 2).

    A Hann window hides the borders; white noise of variance 1 has a power of 1 everywhere.
    """
    size = images.shape[-1]
    window = torch.hann_window(size, periodic=True, device=images.device)
    window = window[:, None] * window
    centred = images.float() - images.float().mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.fft2(centred * window).abs().square() / window.square().sum()
    cycles = torch.fft.fftfreq(size, 1 / size, device=images.device)
    ring = torch.hypot(cycles[:, None], cycles).round().long().flatten()  # (S * S,)
    rings = torch.zeros(*power.shape[:-2], int(ring.max()) + 1, device=images.device)
    rings = rings.index_add(-1, ring, power.flatten(-2)) / ring.bincount()
    return rings[..., 1 : size // 2 + 1].mean(dim=-2)
