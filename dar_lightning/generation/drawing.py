"""Images by seed and number, or by seed, class and number: each its own noise and tokens, whatever is drawn beside."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dar_lightning.data.transforms import to_uint8
from dar_lightning.generation.pipeline import DARPipeline

ROWS = 32  # images per forward pass, unless somebody wants another number


@dataclass(frozen=True)
class Job:
    """One image to draw.

    Attributes:
        label: its class.
        number: which image of the class it is, from 0.
        kept: (m,) int64 tokens that it starts with.
    """

    label: int
    number: int
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class Drawn:
    """What became of a job, on the CPU.

    Attributes:
        previews: (K, 3, H, W) uint8; the last one is the image.
        codes: (N,) int64.
    """

    previews: Tensor
    codes: Tensor


def image_seed(seed: int, label: int, number: int) -> int:
    """The seed of image `number` of a class: 63 bits, which is what torch takes (its CPU generator looks at 32)."""
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def draw_rows(
    pipe: DARPipeline, members: Sequence[tuple[int, int]], seed: int, rows: int, options: dict[str, Any]
) -> Tensor:
    """Images of (number, label) pairs in one forward pass, each a function of (seed, number, label), bit by bit.

    Matrix products round differently for batches of different sizes, in bfloat16 visibly. So the pass always has
    `rows` rows, of which image i takes number i mod rows; the others repeat one of the images.

    Args:
        pipe: the pipeline.
        members: at most one per row.
        seed: with its number it seeds an image's generator.
        rows: another number gives the same images up to rounding, and now and then another token.
        options: of DARPipeline.generate.

    Returns:
        (n, 3, H, W) uint8, where the pipeline is.
    """
    filled = [members[0]] * rows
    for number, label in members:
        filled[number % rows] = (number, label)
    generators = [image_generator(seed, number) for number, _ in filled]
    labels = torch.tensor([label for _, label in filled])
    images = to_uint8(pipe.generate(labels, generator=generators, **options))
    return images[[number % rows for number, _ in members]]


def draw(
    pipe: DARPipeline, jobs: Sequence[Job], seed: int, batch_size: int, options: dict[str, Any]
) -> Iterator[Drawn]:
    """Draw images in batches, with a progress bar.

    Args:
        pipe: the pipeline.
        jobs: what to draw.
        seed: image i of a class is a function of (seed, class, i, kept tokens); the batch changes no more than the
            order of additions does.
        batch_size: images at a time; images that keep different numbers of tokens do not share a batch.
        options: of DARPipeline.stream.

    Yields:
        The images, in the order of the jobs.
    """
    num_tokens = pipe.ar.config.num_tokens
    with tqdm(total=sum(num_tokens - len(job.kept) for job in jobs), desc="sample", unit=" tokens") as bar:
        for kept, alike in groupby(jobs, lambda job: len(job.kept)):
            waiting = list(alike)
            while waiting:
                batch, waiting = waiting[:batch_size], waiting[batch_size:]
                stream = pipe.stream(
                    torch.tensor([job.label for job in batch]),
                    prefix=torch.stack([job.kept for job in batch]),
                    generator=[torch.Generator().manual_seed(image_seed(seed, job.label, job.number)) for job in batch],
                    **options,
                )
                shown, written = [], kept
                for preview in stream:
                    shown.append(to_uint8(preview.images).cpu())
                    count = max(preview.codes.shape[1], kept)
                    bar.update(len(batch) * (count - written))
                    written = count
                for strip, codes in zip(torch.stack(shown, dim=1), preview.codes.cpu(), strict=True):
                    yield Drawn(strip, codes)  # (K, 3, H, W), (N,)


def image_generator(seed: int, number: int) -> torch.Generator:
    """What everything random about image `number` of a set is drawn from.

    torch's CPU generator looks at the low 32 bits of its seed alone, so both must meet there; (seed << 32) + number
    gives the same images for every seed. Within a seed no two numbers share a generator, nor do sets of up to 341,411
    images whose seeds are below 10,000.

    Args:
        seed: of the set.
        number: of the image, below 2^32.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)
