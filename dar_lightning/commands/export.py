"""`dar export`: a Lightning checkpoint as a folder in our format, one model or a whole pipeline."""

import json
from pathlib import Path
from typing import Literal

from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError
from dar_lightning.files import read_json, write_text
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.pipeline import EXPORTED, DARPipeline
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights.lightning import load_lightning_checkpoint


def export(
    ckpt: Path,
    output: Path,
    weights: Literal["auto", "ema", "raw"] = "auto",
    tokenizer: str | None = None,
    shards: Path | None = None,
) -> None:
    """Write the model of a training checkpoint in our format; with a tokenizer, a pipeline of the two.

    `config.json` of each model says whether these are EMA weights, `export.json` which checkpoint they come from.

    Args:
        ckpt: a checkpoint of `dar fit`, of a tokenizer or an AR model.
        output: folder for config.json and model.safetensors, or for the pipeline.
        weights: "ema", the averaged weights; "raw", those that the optimizer works on; "auto", EMA if the run kept one.
        tokenizer: folder or Hugging Face repository of the tokenizer that an AR model's tokens came from.
        shards: for a pipeline: image or token shards whose index.json names the classes.
    """
    model = load_lightning_checkpoint(ckpt, weights)
    facts = {"checkpoint": str(ckpt), "ema": model.averaged}
    if tokenizer is None:
        if shards is not None:
            raise UserError("shards is set without tokenizer: class names belong to a pipeline")
        model.save_pretrained(output)
        said = f"{type(model).__name__}, SHA-256 {model_sha256(model)[:12]}"
    else:
        if not isinstance(model, ARModel):
            raise UserError(f"ckpt {ckpt} is of a tokenizer: a pipeline needs that of an AR model")
        classes = [] if shards is None else read_json(shards / "index.json").get("classes", [])
        decoder = SequentialDiffusionTokenizer.from_pretrained(tokenizer)
        DARPipeline(decoder, model, tuple(classes)).save_pretrained(output)
        facts |= {"tokenizer": tokenizer, "tokenizer_ema": decoder.averaged}
        said = f"pipeline of {model.config.num_classes} classes"
    write_text(output / EXPORTED, json.dumps(facts, indent=2) + "\n")
    print(f"{output}: {said}")
