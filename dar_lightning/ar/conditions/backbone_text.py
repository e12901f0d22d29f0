"""Prompts in a language model's own tokens and embeddings: its tokenizer is kept with the model's weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dar_lightning.ar.conditions.interface import Condition, Prefix, check_captions, check_prompts, say_cut
from dar_lightning.errors import UserError, naming, require


class BackboneText(Condition):
    """Text tokens of the backbone's vocabulary, padded at the left, then one learned vector: "a picture follows".

    A batch is (B, length) int64, -1 for padding, which nothing attends to; padding alone is "no text". `rows` and
    `tokenizer_bytes` follow from the folder that `backbone_options` names. The tokenizer is a buffer, so saved
    weights are all that drawing needs, beside Hugging Face `tokenizers`.

    Args:
        dim: width of the model.
        length: text tokens at most, those that the tokenizer itself adds included; longer texts are cut.
        frozen: keep the embeddings of text as the language model has them; False trains them, too.
        rows: of the language model's embedding table.
        tokenizer_bytes: size of its tokenizer.json.
    """

    def __init__(self, dim: int, length: int = 32, frozen: bool = True, rows: int = 0, tokenizer_bytes: int = 0):
        super().__init__()
        need = "it needs a language model with its weights: set backbone_options.folder"
        require(rows >= 1 <= tokenizer_bytes, f"condition 'backbone_text' has no vocabulary: {need}")
        require(length >= 1, f"condition_options: length is {length}: it must be at least 1")
        self.tokens, self.length = length, length + 1
        self.embedding = nn.Embedding(rows, dim).requires_grad_(not frozen)
        self.begin = nn.Embedding(1, dim)
        self.register_buffer("tokenizer", torch.zeros(tokenizer_bytes, dtype=torch.uint8))
        self._read: list[Any] = []  # the tokenizer, once it is needed

    def forward(self, batch: Tensor) -> Prefix:
        values = torch.cat([self.embedding(batch.clamp(min=0)), self.begin.weight.expand(len(batch), 1, -1)], dim=1)
        return Prefix(values, torch.cat([batch >= 0, batch.new_ones(len(batch), 1, dtype=torch.bool)], dim=1))

    def null(self, count: int) -> Tensor:
        return torch.full((count, self.tokens), -1, device=self.begin.weight.device)

    def from_data(self, batch: Mapping[str, Any]) -> Tensor:
        return self._padded(self._tokens(batch["caption"]))

    def from_prompts(self, prompts: Sequence[str]) -> Tensor:
        check_prompts(prompts)
        found = self._tokens(prompts)
        for text, tokens in zip(prompts, found, strict=True):
            if len(tokens) > self.tokens:
                say_cut(text, len(tokens), self.tokens)
        return self._padded(found)

    def check(self, batch: Tensor) -> None:
        shape = tuple(batch.shape)
        fits = batch.dim() == 2 and shape[1] == self.tokens and not batch.is_floating_point()
        require(fits, f"texts are of shape {shape}: need (B, {self.tokens}) whole numbers, or prompts=[...]")

    def check_data(self, data: Any) -> None:
        check_captions(data, "condition 'backbone_text'")

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._read:
            self._read.append(read_tokenizer(bytes(self.tokenizer.cpu().numpy()), "the model's tokenizer"))
        return [found.ids for found in self._read[0].encode_batch(list(texts))]

    def _padded(self, found: list[list[int]]) -> Tensor:
        rows = [[-1] * (self.tokens - len(tokens)) + tokens[: self.tokens] for tokens in found]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self.tokens)


def read_tokenizer(content: bytes, origin: Any) -> Any:
    """A tokenizers.Tokenizer of what a tokenizer.json holds; it cuts and pads nothing.

    Raises:
        UserError: the package is missing, or the content is no tokenizer of its.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("condition 'backbone_text' needs tokenizers: pip install 'dar-lightning[text]'") from error
    with naming(f"{origin} is no tokenizer.json that Hugging Face tokenizers reads"):
        made = Tokenizer.from_str(content.decode("utf-8"))
    made.no_truncation()
    made.no_padding()
    return made
