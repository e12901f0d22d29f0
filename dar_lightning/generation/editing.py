"""Editing by tokens: read a photo, tokenize it, and choose how many of its first tokens a drawing keeps."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from dar_lightning.data.decode import BadSample, decode_rgb
from dar_lightning.data.transforms import center_crop, to_float, to_tensor
from dar_lightning.errors import UserError
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
        if not 1 <= length < num_tokens:
            raise UserError(f"prefix is {word.strip()}: keep from 1 to {num_tokens - 1} tokens")
    if len({*lengths}) < len(lengths):
        raise UserError(f"prefix is {prefix}: give each number once")
    return lengths
