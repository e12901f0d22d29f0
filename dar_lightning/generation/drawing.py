"""Seeded sampling: each image depends on (seed, number) or (seed, class, number) alone, not on its batch."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dar_lightning.data.transforms import to_uint8
from dar_lightning.generation.pipeline import DARPipeline

ROWS = 32  # images per forward pass, unless somebody wants another number


class Job(NamedTuple):
    """One image to draw: its class or prompt, which image of that it is, and the tokens (m,) int64 it starts with."""

    label: int | str
    number: int
    kept: Tensor = torch.empty(0, dtype=torch.long)


def image_seed(seed: int, label: int | str, number: int) -> int:
    """The seed of image `number` of a class or prompt: 63 bits, as torch takes (its CPU generator looks at 32)."""
    digest = hashlib.sha256(f"{seed}/{label}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generators(seed: int, members: Iterable[tuple[int | str, int]]) -> list[torch.Generator]:
    """One for each (class or prompt, number): what makes an image a function of these and of the seed."""
    return [torch.Generator().manual_seed(image_seed(seed, label, number)) for label, number in members]


def image_generator(seed: int, number: int) -> torch.Generator:
    """The random generator of image `number` of a set.

    torch's CPU generator looks at the low 32 bits of its seed alone, so both must meet there; (seed << 32) + number
    gives the same images for every seed. Within a seed no two numbers share a generator, nor do sets of up to 341,411
    images whose seeds are below 10,000.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + number) % 2**32)


@torch.no_grad()
def draw_rows(
    pipe: DARPipeline, members: Sequence[tuple[int, int]], seed: int, rows: int, options: dict[str, Any]
) -> Tensor:
    """Images of (number, label) pairs in one forward pass, each a function of (seed, number, label), bit by bit.

    Matrix products round differently for batches of different sizes, in bfloat16 visibly. So the pass always has
    `rows` rows, of which image i takes number i mod rows; the others repeat one of the images. Another number of rows
    gives the same images up to rounding, and now and then another token. `options` are those of DARPipeline.generate.

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


def draw_images(
    pipe: DARPipeline,
    jobs: Sequence[Job],
    seed: int,
    batch_size: int,
    options: dict[str, Any],
    groups: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw images in batches, with a progress bar; `options` are those of DARPipeline.stream.

    An image is a function of (seed, class or prompt, number, kept tokens), up to rounding. Those that keep different
    numbers of tokens do not share a batch. With `groups`, tokens and previews of the first groups alone are drawn.

    Yields:
        Of each job, in order: previews (K, 3, H, W) uint8, of which the last is the image, and codes (N,); on the CPU.
    """
    previews = pipe.preview_groups(groups, options.get("start", 0))
    num_tokens = pipe.tokenizer.schedule.tokens_for_groups(previews.stop - 1)
    with tqdm(total=sum(max(num_tokens - len(job.kept), 0) for job in jobs), desc="sample", unit=" tokens") as bar:
        for kept, group in groupby(jobs, lambda job: len(job.kept)):
            alike = list(group)
            for batch in (alike[start : start + batch_size] for start in range(0, len(alike), batch_size)):
                stream = pipe.stream(
                    pipe.condition([job.label for job in batch]),
                    prefix=torch.stack([job.kept for job in batch]),
                    generator=generators(seed, [(job.label, job.number) for job in batch]),
                    **options,
                )
                shown, written = [], kept
                for preview in islice(stream, len(previews)):
                    shown.append(to_uint8(preview.images).cpu())
                    count = max(preview.codes.shape[1], kept)
                    bar.update(len(batch) * (count - written))
                    written = count
                yield from zip(torch.stack(shown, dim=1), preview.codes.cpu(), strict=True)
