"""Token influence: how much the tokens, and how much the noise, decide the decoded image, as PSNRs."""

import math

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from dar_lightning.data.transforms import to_uint8
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

# Recorded beside the values: they change with each of these choices.
TOKEN_INFLUENCE_PROTOCOL = {
    "psnr": "of 8-bit decodings, data range 255, mean over images; identical ones as if a single value differed by 1",
    "other_tokens": "of the next of these images, for the last one those of the first",
    "other_noise": "the second draw of the image's generator, whose first one is the noise",
}


def exchanged_groups(num_groups: int) -> list[int]:
    """Groups, counted from 1, from which on tokens are exchanged: the first, the second, that of the later half."""
    return sorted(m for m in {1, 2, num_groups // 2 + 1} if m <= num_groups)


def token_influence_names(num_groups: int) -> list[str]:
    """Names of the columns of `token_influence`."""
    exchanged = [f"psnr_exchanged_from_group_{m}" for m in exchanged_groups(num_groups)]
    return ["psnr_own_tokens", "psnr_other_tokens", "psnr_same_tokens", *exchanged]


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
    """PSNRs (dB) that say what tokens decide, image by image.

    Args:
        tokenizer: what decodes.
        images: (B, 3, H, W) uint8.
        codes: (B, N) their tokens.
        others: (B, N) tokens of other images.
        generators: one per image; it draws the noise first, then the other noise.
        solver: see `tokenizer.flow.integrate`.
        num_steps: diffusion steps; None is one per group of tokens.

    Returns:
        (B, columns) of `token_influence_names`: the image against its decoding from its own tokens, and from the
        others'; its decoding against that of the same tokens from other noise; its decoding against that from the same
        noise with the others' tokens from group m on.
    """
    size = images.shape[2:]
    noise, other_noise = (tokenizer.draw_noise(len(images), generators, size) for _ in range(2))

    def decode(codes: Tensor, noise: Tensor) -> Tensor:
        return to_uint8(tokenizer.detokenize(codes, noise, solver, num_steps=num_steps))

    num_groups = tokenizer.config.num_groups
    firsts = [(m - 1) * codes.shape[1] // num_groups for m in exchanged_groups(num_groups)]  # tokens that are exchanged
    exchanged = [decode(torch.cat([codes[:, :first], others[:, first:]], dim=1), noise) for first in firsts]
    own = decode(codes, noise)
    pairs = [(own, images), (exchanged[0], images), (decode(codes, other_noise), own)]
    pairs += [(decoding, own) for decoding in exchanged]
    return torch.stack([_psnr(*pair) for pair in pairs], dim=1)


def _psnr(images: Tensor, others: Tensor) -> Tensor:
    """Of each pair of uint8 images (B, 3, H, W): (B,); finite, so that a mean over images stays a number."""
    psnr = peak_signal_noise_ratio(images.float(), others.float(), 255.0, reduction="none", dim=(1, 2, 3))
    return psnr.clamp(max=10 * math.log10(255**2 * images[0].numel()))
