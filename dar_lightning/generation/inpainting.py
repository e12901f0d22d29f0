"""Inpainting, outpainting and image-to-image without training: known pixels stay, the rest is drawn to fit."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_lightning.errors import check_range, require
from dar_lightning.tokenizer.flow import shift_time
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

EVIDENCE = 8.0  # chosen on pictures: larger ones copy, smaller ones let the class win


class Edit:
    """What a drawing takes from an image: pixels to keep, a state to start from, and tokens to prefer.

    The decoder is a flow in pixel space, so a known pixel has a known path: from its noise straight to its value. There
    the network's velocity is replaced by that path's, which keeps the pixel in every state and preview, whatever the
    solver; around it the difference between the two is spread smoothly, so that the border does not show.

    Args:
        tokenizer: decodes the drawing.
        noise: (B, 3, H, W), where the diffusion would start.
        image: (B or 1, 3, H, W) in [-1, 1]; None for a plain drawing, which then stays the same bit by bit.
        known: (B or 1, 1, H, W) bool, pixels that are kept; None keeps none, and takes the rest from the whole image.
        start: n of K groups: the diffusion starts from the image, noised to where the steps of n groups would lead.
        evidence: L. Added to the logits of a token in group k is L / 2^(k - 1) times the cosine between each code and
            the encoder's latent of the image, whose unknown pixels are filled smoothly first.

    Raises:
        UserError: for another size or type, a value out of range, or a part of an image without one.
    """

    def __init__(
        self,
        tokenizer: SequentialDiffusionTokenizer,
        noise: Tensor,
        image: Tensor | None = None,
        known: Tensor | None = None,
        start: int = 0,
        evidence: float = EVIDENCE,
    ):
        self.state = noise
        """Where the diffusion starts."""
        self.correct: Callable[[Tensor], Tensor] | None = None
        """The velocity (B, 3, H, W) that is used, of the network's."""
        self.bias: Callable[[Tensor], Tensor] | None = None
        """What is added to logits (B, V), of the tokens' places (B,)."""
        self.image, self.known = image, known
        if image is None:
            require(known is None and start == 0, "known and start are of an image: give the image, too")
            return
        config = tokenizer.config
        check_range(0, evidence=evidence)
        image, known = self.image, self.known = _checked(image, known, noise)
        if start:
            t = shift_time(start / config.num_groups, config.time_shift)
            self.state = t * config.data_std * image + (1 - t) * noise
        if evidence:
            self.bias = _token_bias(tokenizer, image, known, len(noise), evidence)
        if known is not None:
            velocity, reach = config.data_std * image - noise, config.decoder_patch_size
            self.correct = lambda v: torch.where(known, velocity, v + spread(velocity - v, known, reach))

    def paste(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) with the known pixels bit by bit, which rounding may have moved."""
        return images if self.known is None else torch.where(self.known, self.image, images)


def _checked(image: Tensor, known: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor | None]:
    """Image and mask, on the device, float32 and bool; UserError for what does not fit the noise."""
    count, _, height, width = noise.shape
    given, counts = tuple(image.shape), f"{count} or 1"
    fits = given[1:] == (3, height, width) and given[0] in (count, 1) and image.is_floating_point()
    require(fits, f"image is {image.dtype} {given}: need floats ({counts}, 3, {height}, {width}) in [-1, 1]")
    image = image.to(noise.device, torch.float32)
    if known is None:
        return image, None
    given = tuple(known.shape)
    fits = given[1:] == (1, height, width) and given[0] in (count, 1) and known.dtype == torch.bool
    require(fits, f"known is {known.dtype} {given}: need bool ({counts}, 1, {height}, {width})")
    return image, known.to(noise.device)


@torch.no_grad()
def _token_bias(
    tokenizer: SequentialDiffusionTokenizer, image: Tensor, known: Tensor | None, count: int, evidence: float
) -> Callable[[Tensor], Tensor]:
    """The function from places (B,) to what is added to the logits (B, V): no (B, N, V) tensor exists."""
    config = tokenizer.config
    group = torch.arange(config.num_tokens, device=image.device) * config.num_groups // config.num_tokens
    weight = evidence * 0.5 ** group[None, :, None]
    if known is not None:
        image = fill(image, known)
        weight = weight * known.any(dim=(1, 2, 3)).view(-1, 1, 1)  # an image of which nothing is known says nothing
    latents = tokenizer.encoder(image.to(tokenizer.dtype), running_statistics=True).float()
    wanted = (weight * F.normalize(latents, dim=-1)).expand(count, -1, -1)  # (B, N, d)
    codes = tokenizer.quantizer.lookup(torch.arange(config.codebook_size, device=image.device))
    codes, rows = F.normalize(codes.float(), dim=-1).T, torch.arange(count, device=image.device)  # (d, V)
    return lambda places: wanted[rows, places] @ codes


def _neighbours(x: Tensor) -> Tensor:
    """Mean of the four neighbours of each pixel; at its edges an image goes on as it ends."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]) / 4


def spread(x: Tensor, known: Tensor, reach: int) -> Tensor:
    """x (B, 3, H, W) where known; elsewhere a smooth continuation that fades to 0 over about `reach` pixels.

    reach^2 sweeps of Jacobi's method lead from 0 towards the screened Laplace equation, laplacian = x / reach^2; the
    rest, as far away as they do not get, matters little.
    """
    fade = 4 / (4 + 1 / reach**2)
    x = out = torch.where(known, x, 0)
    for _ in range(reach**2):
        out = torch.where(known, x, fade * _neighbours(out))
    return out


def fill(x: Tensor, known: Tensor, sweeps: int = 32) -> Tensor:
    """x (B, 3, H, W) where known (B, 1, H, W), either of which may be one for all; elsewhere smooth.

    Laplace's equation, coarse to fine, with so many sweeps a level.
    """
    x, known = torch.broadcast_tensors(x, known)
    return _fill(torch.where(known, x, 0), known.to(x), sweeps)


def _fill(total: Tensor, weight: Tensor, sweeps: int) -> Tensor:
    """The same of sums of known values, and of how much of each pixel is known."""
    first, seen = total / weight.clamp(min=1e-6), weight > 0
    height, width = total.shape[-2:]
    if max(height, width) == 1 or bool(seen.all()):
        return first
    even = (0, width % 2, 0, height % 2)
    coarse = _fill(*(F.avg_pool2d(F.pad(part, even), 2) for part in (total, weight)), sweeps)
    out = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., :height, :width]
    for _ in range(sweeps):
        out = torch.where(seen, first, _neighbours(out))
    return torch.where(seen, first, out)
