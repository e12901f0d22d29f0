"""`dar convert`: an official checkpoint file, or a Llama of transformers, becomes a folder in our format."""

from pathlib import Path
from typing import Literal

from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError, begin_work, naming, require
from dar_lightning.files import load_yaml
from dar_lightning.formats.checkpoint import Weights, pick_weights, read_checkpoint
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import load_llama, load_official_ar, load_official_tokenizer


def convert(
    input: Path,
    output: Path,
    official_config: Path | None = None,
    part: Literal["auto", "tokenizer", "ar"] = "auto",
    weights: Weights = "auto",
) -> None:
    """Write the official implementation's tokenizer or AR model in our format; or an AR model back from transformers.

    Args:
        input: the official .pt or .safetensors file; or a folder of `dar export --format transformers`, for which the
            other options are left out.
        output: folder for config.json and model.safetensors.
        official_config: YAML or JSON file: the tokenizer's official YAML, or the AR model's constructor arguments.
            Needed where the file carries none and the AR model is not of a released size.
        part: what the file holds; "auto" tells by its tensors.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes what the official code's own loader takes.
    """
    load = _load_llama if input.is_dir() else _load_official
    model = load(input, official_config, part, weights)
    begin_work()
    model.save_pretrained(output)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {type(model).__name__}, {count / 1e6:.2f}M parameters, SHA-256 {model_sha256(model)[:12]}")


def _load_llama(folder: Path, official_config: Path | None, part: str, weights: str) -> ARModel:
    for name, value in (("official_config", official_config), ("part", part), ("weights", weights)):
        if value not in (None, "auto"):
            raise UserError(f"{name} is {str(value)!r}, which is for an official file: {folder} is a folder")
    return load_llama(folder)


def _load_official(
    path: Path, official_config: Path | None, part: str, weights: Weights
) -> SequentialDiffusionTokenizer | ARModel:
    checkpoint = read_checkpoint(path)
    if part == "auto":
        state, _ = pick_weights(checkpoint, "auto", prefer_ema=True, origin=path)
        marks = {"tok_embeddings.weight": "ar", "quantize.embedding.weight": "tokenizer"}
        part = next((part for name, part in marks.items() if name in state), None)
        require(part is not None, f"{path} holds neither an official tokenizer nor an official AR model")
    load = load_official_tokenizer if part == "tokenizer" else load_official_ar
    config = None
    if official_config is not None:
        with naming(f"cannot read {official_config}"):
            config = load_yaml(official_config.read_text(encoding="utf-8"), str(official_config))
        require(isinstance(config, dict), f"{official_config} holds a {type(config).__name__}: need a mapping")
    try:
        return load(checkpoint, config, weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
