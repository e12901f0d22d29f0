"""Jacobi sampling (`ar.jacobi`) against drawing one by one: tokens accepted a pass and CPU time, by window and batch.

Tokens are the same up to rounding: images with others are counted. Accepted are, of a pass, the tokens that it makes
final for all images of the batch; images that are further on wait for the last one. Window 0 is drawing one by one.

    python benchmarks/jacobi.py [--pipeline fruit64] [--windows 8 64] [--batches 1 14] [--guidance 1 4] [--output FILE]
"""

from collections.abc import Iterator
from itertools import product
from time import process_time
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, options, record
from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar.sampling import generate

IMAGES = 28  # drawn for each row, two of each of the shipped model's classes


def draw(ar: ARModel, batch: int, scale: float, window: int) -> tuple[Tensor, int, float]:
    """Tokens (IMAGES, N), drawn `batch` at a time; passes of a window in all, and seconds of this process in all."""
    labels = torch.arange(IMAGES) % ar.config.num_classes
    seeds = [torch.Generator().manual_seed(number) for number in range(IMAGES)]
    passes, read = [], ARModel.read
    start = process_time()
    with patch.object(ARModel, "read", lambda *arguments: passes.append(1) or read(*arguments)):
        tokens = [
            generate(ar, labels[i : i + batch], guidance=scale, jacobi=window, generator=seeds[i : i + batch])
            for i in range(0, IMAGES, batch)
        ]
    return torch.cat(tokens), len(passes), process_time() - start


def rows(pipeline: str, windows: list[int], batches: list[int], guidance: list[float]) -> Iterator[dict]:
    """A row for each guidance scale, batch and window."""
    ar = DARPipeline.from_pretrained(pipeline).ar.float().eval()  # in bfloat16 rounding tells the two ways apart
    draw(ar, IMAGES, 2.0, 0)  # warms up
    for scale, batch in product(guidance, batches):
        number = -(-IMAGES // batch)
        one = None
        for window in (0, *windows):
            tokens, passes, seconds = draw(ar, batch, scale, window)
            one = tokens if one is None else one
            passes = passes / number if window else ar.config.num_tokens
            yield {
                "guidance": scale,
                "batch": batch,
                "window": window,
                "images": IMAGES,
                "passes a batch": round(passes, 2),
                "accepted a pass": round(ar.config.num_tokens / passes, 2),
                "CPU seconds a batch": round(seconds / number, 3),
                "images that differ": int((tokens != one).any(1).sum()),
            }


if __name__ == "__main__":
    default = RESULTS / "jacobi.json"
    given = options(
        __doc__, pipeline="fruit64", windows=[8, 16, 32, 64], batches=[1, 14], guidance=[1.0, 4.0], output=default
    )
    record(given.output, "Jacobi sampling", rows(given.pipeline, given.windows, given.batches, given.guidance))
