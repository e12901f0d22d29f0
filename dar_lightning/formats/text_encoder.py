"""Frozen text encoder from transformers: token features of captions; weights as safetensors only."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dar_lightning.errors import UserError, naming, one_line, require
from dar_lightning.files import file_sha256
from dar_lightning.formats.pretrained import resolve_folder

FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
LOCAL = {"local_files_only": True, "trust_remote_code": False}  # how transformers may read a folder
UNREADABLE = (OSError, ValueError, KeyError, ImportError, RuntimeError)  # what it raises of one that it cannot read


def encoder_files(source: str | Path, option: str) -> tuple[Path, list[Path]]:
    """A folder for transformers, which is kept quiet, and its files of weights, safetensors alone.

    Raises:
        UserError: transformers is missing; there is no such folder, or no safetensors in it.
    """
    try:
        folder = resolve_folder(source, FILES)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None  # of one line
    files = sorted(folder.glob("*.safetensors"))
    require(files, f"{option}: {source} has no .safetensors; weights in other formats are not read")
    try:
        from transformers import logging
    except ImportError as error:
        raise UserError(f"{option}: {source} needs transformers: pip install 'dar-lightning[text]'") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return folder, files


def weights_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of a model's weights: that of its only file, or of the hashes of several."""
    digests = [file_sha256(path) for path in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


class TextEncoder(nn.Module):
    """A text encoder and its tokenizer: BERT-like models, T5's encoder, CLIP's text model. Runs in float32.

    Args:
        source: a local folder with config.json, a tokenizer and .safetensors files, or a Hugging Face repository.
        length: tokens of a text at most; longer ones are cut.
        option: what the user calls the source, for error lines.

    Raises:
        UserError: transformers is missing; there is no such folder, or no safetensors in it; transformers cannot read
            it without its own code; it cannot encode texts of that length.
    """

    def __init__(self, source: str | Path, length: int, option: str = "encoder"):
        super().__init__()
        folder, files = encoder_files(source, option)
        from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
            both = AutoConfig.from_pretrained(folder, **LOCAL).is_encoder_decoder
            kind = AutoModelForTextEncoding if both else AutoModel
            # "eager", whatever the config asks for: other attention may be code from the Hub
            options = LOCAL | {"attn_implementation": "eager", "use_safetensors": True}
            whole = kind.from_pretrained(folder, dtype=torch.float32, **options)
        except UNREADABLE as error:
            raise UserError(f"{option}: transformers cannot read {source}: {one_line(error)}") from error
        self.network = getattr(whole, "text_model", whole).eval().requires_grad_(False)
        config = getattr(whole.config, "text_config", whole.config)
        self.name, self.length, self.dim = str(source), length, config.hidden_size
        self.sha256 = weights_sha256(files)
        kinds = ValueError, KeyError, IndexError, RuntimeError, TypeError, AttributeError
        with naming(f"{option}: {source} cannot encode texts of up to {length} tokens", *kinds):
            self(["a", "a " * min(length, 512)])  # two, as batches have: it may know no padding, mask or so many places

    def train(self, mode: bool = True):
        """Stay in evaluation mode, whatever mode the model is put into."""
        return super().train(False)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, uncut, of which `forward` reads `length`."""
        return [len(ids) for ids in self.tokenizer(list(texts), return_attention_mask=False)["input_ids"]]

    @torch.no_grad()
    def forward(self, texts: Sequence[str], batch_size: int = 64) -> list[np.ndarray]:
        """Features of each text's tokens: (n, dim) float16 arrays, n from 1 to `length`."""
        device, found = next(self.network.parameters()).device, []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            read = self.tokenizer(part, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            ids, mask = read["input_ids"].to(device), read["attention_mask"].to(device)
            with torch.autocast(device.type, enabled=False):
                features = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.half().cpu()
            found += [row[kept].numpy() for row, kept in zip(features, mask.bool().cpu(), strict=True)]
        return found
