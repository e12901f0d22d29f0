"""What a backbone is: the causal network between embeddings and head; embeddings in, hidden states out."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from dar_lightning.layers import TableModule


class BackboneCache:
    """What a backbone keeps of the sequences that it has read, so that the next call reads new positions alone."""

    def __init__(self):
        self.length = 0  # positions read; the AR model counts on after each call
        self.real: Tensor | None = None  # (B, P) bool: False for padding at the start; None: all are real
        self.state: Any = None
        """The backbone's own: None at first, then tensors (B, ...), also in tuples, lists or dicts."""

    def keep(self, batch: int) -> None:
        """Go on with the first `batch` sequences alone."""
        self.state = tree_map_only(Tensor, lambda tensor: tensor[:batch], self.state)
        self.real = None if self.real is None else self.real[:batch]


class Backbone(TableModule, ABC):
    """Base class of backbones, built as `Cls(config, length, **options)`.

    `config` is the ARConfig, whose `dim` is the width D of what comes in and goes out; `length` is that of the longest
    sequence, P - 1 + N. What depends on positions alone and is not saved must be in `tables`.
    """

    @abstractmethod
    def forward(
        self, x: Tensor, real: Tensor | None = None, cache: BackboneCache | None = None, recompute: bool = False
    ) -> Tensor:
        """Hidden states (B, L, D) after the last norm. Position i must depend on positions up to i alone.

        Args:
            x: (B, L, D) embeddings of whole sequences; with a cache, of what continues those that it has read.
            real: (B, P) bool, places of the prefix that may be attended to; None: all.
            cache: of `make_cache`; this call reads and replaces its `state`.
            recompute: compute activations again in the backward pass instead of keeping them (activation
                checkpointing); one that cannot may ignore it.
        """

    def make_cache(self) -> BackboneCache:
        """A new, empty cache, for sampling."""
        return BackboneCache()
