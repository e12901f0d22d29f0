"""Editing: read a photo and a mask, keep its first tokens or its pixels, and draw images that are like another."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dar_lightning.data.decode import BadSample, decode_rgb
from dar_lightning.data.transforms import center_crop, to_float, to_tensor, to_uint8
from dar_lightning.errors import UserError, require
from dar_lightning.generation.drawing import Job, generators
from dar_lightning.generation.inpainting import EVIDENCE
from dar_lightning.generation.pipeline import DARPipeline


def read_photo(path: str | Path, name: str = "the photo") -> Image.Image:
    """Read an image file of any format that shards may hold, as RGB; an error's line begins with `name`."""
    try:
        return decode_rgb(Path(path).read_bytes())
    except (OSError, BadSample) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name} cannot be read: {reason}") from error


def middle(pipe: DARPipeline, photo: Image.Image) -> Tensor:
    """The part of a photo that the tokenizer sees: (3, H, W) uint8."""
    return to_tensor(center_crop(photo, pipe.tokenizer.config.image_size))


def tokenize(pipe: DARPipeline, photo: Image.Image) -> Tensor:
    """All tokens (1, N) of the middle of a photo."""
    return pipe.tokenizer.tokenize(to_float(middle(pipe, photo)[None]).to(pipe.device))


def prefix_lengths(prefix: str | int | None, num_tokens: int, num_groups: int) -> list[int]:
    """Read how many tokens to keep: one number, or several with commas between; None is one group of tokens."""
    words = str(num_tokens // num_groups if prefix is None else prefix).split(",")
    lengths = [int(word) if word.strip().isdecimal() else 0 for word in words]
    for word, length in zip(words, lengths, strict=True):
        require(1 <= length < num_tokens, f"prefix is {word.strip()}: keep from 1 to {num_tokens - 1} tokens")
    require(len({*lengths}) == len(lengths), f"prefix is {prefix}: give each number once")
    return lengths


def read_edit(
    pipe: DARPipeline, image: str | None, mask: str | None, start: int, evidence: float | None
) -> dict[str, Any]:
    """The options of `dar sample` that edit an image file, as those of DARPipeline.stream; none without an image."""
    if image is None:
        given = [name for name, value in (("mask", mask), ("start", start), ("evidence", evidence)) if value]
        require(not given, f"{', '.join(given)} set without image: give the image that is to be edited")
        return {}
    photo = read_photo(image, f"image: {image}")
    options = {"start": start, "evidence": EVIDENCE if evidence is None else evidence}
    options |= {"image": to_float(middle(pipe, photo)[None])}
    if mask is not None:
        options["known"] = ~read_mask(pipe, read_photo(mask, f"mask: {mask}"), photo.size, f"mask: {mask}")
    return options


def read_mask(pipe: DARPipeline, mask: Image.Image, size: tuple[int, int], name: str = "the mask") -> Tensor:
    """What to draw anew, (1, 1, H, W) bool: where a mask of the photo's size, cropped as the photo, is white.

    An error's line begins with `name`.
    """
    found, right = ("{}x{}".format(*each) for each in (mask.size, size))
    require(found == right, f"{name} is {found} pixels: need the image's {right}")
    anew = middle(pipe, mask)[None].float().mean(dim=1, keepdim=True) >= 128
    require(
        bool(anew.any()),
        f"{name} has nothing white in its middle square: white is what is drawn anew, black what is kept",
    )
    require(
        not bool(anew.all()),
        f"{name} is white all over its middle square: nothing of the image is kept; leave the mask out",
    )
    return anew


def mix_noise(noise: Tensor, new: Tensor, strength: float) -> Tensor:
    """Standard normal noise that is like another: sqrt(1 - strength^2) noise + strength new, strength in [0, 1]."""
    return math.sqrt(1 - strength**2) * noise + strength * new


@torch.no_grad()
def draw_alike(
    pipe: DARPipeline, jobs: Sequence[Job], picked: int, seed: int, strength: float, batch_size: int, **options
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images that are like image `picked` of their class: its tokens, which the jobs keep, and its noise, mixed.

    The new noise is that of each job's own number. `options` are those of `tokenizer.previews`: solver, num_steps.

    Yields:
        As `drawing.draw_images`.
    """
    for batch in (jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)):
        members = ([(job.label, picked) for job in batch], [(job.label, job.number) for job in batch])
        old, new = (pipe.tokenizer.draw_noise(len(batch), generators(seed, each)) for each in members)
        codes = torch.stack([job.kept for job in batch])
        previews = pipe.tokenizer.previews(codes.to(pipe.device), mix_noise(old, new, strength), **options)
        yield from zip(to_uint8(previews).cpu(), codes, strict=True)
