"""Captions as learned tokens: a small WordPiece vocabulary, kept in the model's config; no text encoder is needed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dar_lightning.ar.conditions.interface import Condition, Prefix, check_captions, check_prompts, say_cut
from dar_lightning.errors import UserError, require

PAD, UNKNOWN = "[PAD]", "[UNK]"  # the first two pieces of every vocabulary
INSIDE = "##"  # begins a piece that goes on with a word
LONGEST = 100  # letters of a word that is cut into pieces, as in Hugging Face's tokenizers


class CaptionTokens(Condition):
    """Places for `length` caption tokens with a learned vector each; those that a caption leaves empty are [PAD].

    [PAD] is learned too and attended to, so no mask is needed; a caption of [PAD] alone is "no caption". A caption is
    cut into words and signs, in lower case, and these into the longest pieces of the vocabulary.

    Args:
        dim: width of the model.
        vocabulary: all pieces with spaces between, as `dar extract --vocabulary` writes them (condition.json).
        length: tokens of a caption; longer ones are cut.

    Raises:
        UserError: there is no vocabulary, or length is no positive number.
    """

    def __init__(self, dim: int, vocabulary: str = "", length: int = 16):
        super().__init__()
        pieces = vocabulary.split()
        known = pieces[:2] == [PAD, UNKNOWN] and len({*pieces}) == len(pieces)
        need = "give `file`, the condition.json that dar extract --vocabulary wrote"
        require(known, f"condition_options: vocabulary has {len(pieces)} pieces and is none: {need}")
        require(length >= 1, f"condition_options: length is {length}: it must be at least 1")
        self.length, self.pieces = length, {piece: number for number, piece in enumerate(pieces)}
        self.longest = max(map(len, pieces))  # letters of a piece
        self.example = max((piece for piece in pieces[2:] if not piece.startswith(INSIDE)), key=len, default="")
        self.embedding = nn.Embedding(len(pieces), dim)

    def forward(self, batch: Tensor) -> Prefix:
        return Prefix(self.embedding(batch))

    def null(self, count: int) -> Tensor:
        return torch.zeros(count, self.length, dtype=torch.long, device=self.embedding.weight.device)

    def tokens(self, text: str) -> list[int]:
        """All tokens of a caption."""
        return [token for word in words(text) for token in word_pieces(word, self.pieces, self.longest)]

    def from_data(self, batch: Mapping[str, Any]) -> Tensor:
        return self._padded([self.tokens(text) for text in batch["caption"]])

    def from_prompts(self, prompts: Sequence[str]) -> Tensor:
        check_prompts(prompts)
        found = [self.tokens(text) for text in prompts]
        for text, tokens in zip(prompts, found, strict=True):
            if len(tokens) > self.length:
                say_cut(text, len(tokens), self.length)
            require({*tokens} != {1}, f"prompts: {text!r:.60} holds no word that this model has seen")
        return self._padded(found)

    def _padded(self, found: list[list[int]]) -> Tensor:
        rows = [tokens[: self.length] + [0] * (self.length - len(tokens)) for tokens in found]
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self.length)

    def check(self, batch: Tensor) -> None:
        shape = tuple(batch.shape)
        fits = batch.dim() == 2 and shape[1] == self.length and not batch.is_floating_point()
        require(fits, f"captions are of shape {shape}: need (B, {self.length}) whole numbers, or prompts=[...]")

    def check_data(self, data: Any) -> None:
        check_captions(data, "condition 'caption_tokens'")


def words(text: str) -> list[str]:
    """Words and single signs of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def word_pieces(word: str, pieces: Mapping[str, int], longest: int) -> list[int]:
    """WordPiece: from the left the longest piece that there is; none has more than `longest` letters.

    [UNK] for a word that has none somewhere, or more than 100 letters.
    """
    if len(word) > LONGEST:
        return [pieces[UNKNOWN]]
    tokens, start = [], 0
    while start < len(word):
        inside = INSIDE if start else ""
        last = min(len(word), start + longest)
        ends = (end for end in range(last, start, -1) if inside + word[start:end] in pieces)
        if (end := next(ends, None)) is None:
            return [pieces[UNKNOWN]]
        tokens.append(pieces[inside + word[start:end]])
        start = end
    return tokens


def train_vocabulary(captions: Iterable[str], size: int) -> str:
    """Train a WordPiece vocabulary of at most `size` pieces on captions, by Hugging Face `tokenizers`.

    Raises:
        UserError: the package is not installed, or the captions alone have more letters than `size`.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError("vocabulary needs Hugging Face tokenizers: pip install 'dar-lightning[text]'") from error
    model = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [PAD, UNKNOWN]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    model.train_from_iterator((" ".join(words(text)) for text in captions), trainer)
    pieces = sorted(model.get_vocab().keys() - {*special})  # ties are broken at random, which ids need not show
    pieces = special + pieces
    require(len(pieces) <= size, f"vocabulary is {size}: the letters of the captions alone are {len(pieces)} pieces")
    return " ".join(pieces)
