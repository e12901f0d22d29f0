"""What a condition is: what a picture is asked for, as a prefix of P vectors before the image's tokens."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from dar_lightning.errors import UserError, require

log = logging.getLogger(__name__)


class Prefix(NamedTuple):
    """What a condition puts before the tokens of images."""

    values: Tensor
    """(B, P, D) embeddings."""
    real: Tensor | None = None
    """(B, P) bool: False where a place is padding, which nothing attends to. None: all are real, the fast path."""


class Condition(nn.Module, ABC):
    """Base class of conditions: turns a batch of what is asked for into the prefix that the image's tokens follow.

    It is built as `Cls(dim, **options)`. A batch is one tensor (B, ...): labels (B,), caption tokens (B, P) and so on;
    "no condition", for dropout and guidance, is a batch too (`null`). Weights of nn.Linear and nn.Embedding start as
    all of the model's do. All buffers must be saved.
    """

    length: int = 1
    """P. The last place predicts the first token."""
    takes: Literal["labels", "prompts", "nothing"] = "prompts"
    """What a user asks with."""
    example: str = "a red apple"
    """A prompt that model cards show."""
    num_labels: int = 0
    """Labels are below it; 0 if it takes none."""

    @abstractmethod
    def forward(self, batch: Tensor) -> Prefix:
        """The prefix of a batch (B, ...)."""

    @abstractmethod
    def null(self, count: int) -> Tensor:
        """The batch (count, ...) that asks for nothing, on the device of the weights."""

    def from_data(self, batch: Mapping[str, Any]) -> Tensor:
        """The batch (B, ...) of training samples, which are a batch of CodesDataModule."""
        raise UserError(f"condition {type(self).__name__} has no method from_data, which training needs")

    def from_prompts(self, prompts: Sequence[str]) -> Tensor:
        """The batch (B, ...) of texts of a user. UserError for one that cannot be read."""
        raise UserError(f"prompts: this model takes {self.takes}, not text")

    def check(self, batch: Tensor) -> None:
        """UserError for a batch that a user has made and this cannot read."""

    def check_data(self, data: Any) -> None:
        """UserError if the samples of a CodesDataModule lack what `from_data` reads."""


def check_captions(data: Any, what: str) -> None:
    """UserError unless the token shards of a CodesDataModule have captions, which `what` needs."""
    for split in data.splits:
        said = f"data.{split}: its token shards have no captions, which {what} needs"
        require(data.index(split).captioned, f"{said}: run `dar extract` on shards with captions")


def check_prompts(prompts: Sequence[str]) -> None:
    """UserError for an empty prompt."""
    for number, text in enumerate(prompts):
        require(isinstance(text, str) and text.strip(), f"prompts: number {number} is {text!r}: say what to draw")


@lru_cache(maxsize=64)  # a prompt is encoded for each batch of its pictures
def say_cut(text: str, count: int, length: int) -> None:
    """Warn of a prompt that is cut."""
    log.warning("prompt %.60r has %d tokens: cut to the first %d", text, count, length)
