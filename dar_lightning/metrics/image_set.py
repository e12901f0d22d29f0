"""ImageSet, the protocol of a set of images to measure, and its progress bar."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

Batch = tuple[Tensor, Tensor | None]  # uint8 images (B, 3, H, W) and, where the set has labels, int64 (B,)


class ImageSet(Protocol):
    """Images of one size, in a fixed order."""

    protocol: dict[str, Any]  # what is needed to measure the same images again, for JSON
    labelled: bool  # whether batches have labels

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """The set once, in order: this rank's are rank, rank + world_size, ...; of drawn images, in whole batches."""


def with_progress(images: ImageSet, batch_size: int, title: str) -> Iterator[Batch]:
    """The batches of a set, under a progress bar that counts images."""
    with tqdm(total=len(images), desc=title, unit="image") as bar:
        for batch in images.batches(batch_size):
            yield batch
            bar.update(len(batch[0]))
