"""Features of a frozen text encoder as the condition, through a small MLP (LlamaGen's way)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.ar.conditions.interface import Condition, Prefix, check_captions, check_prompts, say_cut
from dar_lightning.errors import UserError, require
from dar_lightning.formats.text_encoder import TextEncoder


class EncoderFeatures(Condition):
    """Token features (B, P, channels) of captions, padded at the left with zeros that nothing attends to, projected.

    All zeros are "no caption": one learned vector in the last place, so that it knows nothing of a caption's length.
    Options come from the condition.json that `dar extract --encoder` writes. The encoder is no part of the model: it is
    loaded for prompts, from `encoder` or from where `use_encoder` says, and must have the SHA-256 that made the
    training features. Longer prompts are cut, which is said.

    Args:
        dim: width of the model.
        channels: of the features.
        length: P, tokens of a caption at most.
        encoder: folder or Hugging Face repository of the encoder.
        sha256: of its weights (`formats.text_encoder`).
    """

    def __init__(self, dim: int, channels: int = 0, length: int = 16, encoder: str = "", sha256: str = ""):
        super().__init__()
        need = "give `file`, the condition.json that dar extract --encoder wrote"
        require(channels >= 1 and length >= 1, f"condition_options: channels {channels}, length {length}: {need}")
        self.channels, self.length, self.sha256 = channels, length, sha256
        self.project = nn.Sequential(
            nn.Linear(channels, dim, bias=False), nn.GELU(approximate="tanh"), nn.Linear(dim, dim, bias=False)
        )
        self.null_embedding = nn.Embedding(1, dim)
        self._source, self._encoders = encoder, []  # in a list: no submodule, whose weights would be saved

    def __getstate__(self) -> dict[str, Any]:
        """State for copies, such as the average of EMA: without the text encoder."""
        return self.__dict__ | {"_encoders": []}

    def forward(self, batch: Tensor) -> Prefix:
        real = batch.ne(0).any(dim=-1)  # (B, P)
        asked = real.any(dim=1)[:, None]
        values = self.project(batch.to(self.null_embedding.weight.dtype))
        null = F.pad(self.null_embedding.weight, (0, 0, self.length - 1, 0))  # (P, D), the vector last
        last = torch.arange(self.length, device=batch.device) == self.length - 1
        return Prefix(torch.where(asked[..., None], values, null.to(values.dtype)), real | ~asked & last)

    def null(self, count: int) -> Tensor:
        weight = self.null_embedding.weight
        return torch.zeros(count, self.length, self.channels, dtype=torch.float16, device=weight.device)

    def from_data(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["features"]

    def use_encoder(self, source: str | None = None) -> None:
        """Load the encoder of prompts, from `source` or where that of the training features was.

        Raises:
            UserError: it cannot be read, or is another one.
        """
        source = self._source if source is None else source
        encoder = TextEncoder(source, self.length)
        if encoder.sha256 != self.sha256:
            raise UserError(
                f"encoder: {source} has weights {encoder.sha256[:12]}, the model was trained on features of "
                f"{self.sha256[:12]}: give that encoder"
            )
        self._encoders = [encoder]

    def from_prompts(self, prompts: Sequence[str]) -> Tensor:
        check_prompts(prompts)
        if not self._encoders:
            self.use_encoder()
        (encoder,) = self._encoders
        for text, count in zip(prompts, encoder.count_tokens(prompts), strict=True):
            if count > self.length:
                say_cut(text, count, self.length)
        found = map(torch.from_numpy, encoder(prompts))
        return torch.stack([F.pad(each, (0, 0, self.length - len(each), 0)) for each in found])

    def check(self, batch: Tensor) -> None:
        shape, wanted = tuple(batch.shape[1:]), (self.length, self.channels)
        require(shape == wanted, f"features are (B, {', '.join(map(str, shape))}): need (B, {wanted[0]}, {wanted[1]})")

    def check_data(self, data: Any) -> None:
        check_captions(data, "condition 'features'")
        for split in data.splits:
            made_by = data.index(split).encoder or {"sha256": "none", "channels": 0, "length": 0}
            if made_by["sha256"] != self.sha256:
                raise UserError(
                    f"data.{split}: its features are of encoder {made_by['sha256'][:12]}, the config names "
                    f"{self.sha256[:12]}: run `dar extract --encoder` with the one that you mean"
                )
            theirs, ours = (made_by["length"], made_by["channels"]), (self.length, self.channels)
            require(theirs == ours, f"data.{split}: its features have length and channels {theirs}, the config {ours}")
