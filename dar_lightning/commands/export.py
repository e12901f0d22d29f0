"""`dar export`: a checkpoint as a folder of ours, a model or a pipeline with its card; or one for transformers."""

from pathlib import Path
from typing import Literal

from dar_lightning.ar.model import ARModel, merge_place_tables
from dar_lightning.errors import UserError, begin_work, require
from dar_lightning.files import read_json, write_json, write_text
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.formats.pretrained import resolve_folder
from dar_lightning.generation.card import CARD, NOTES, model_card
from dar_lightning.generation.pipeline import EXPORTED, DARPipeline
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights.lightning import load_lightning_checkpoint
from dar_lightning.weights.llama import save_llama


def export(
    ckpt: Path | None = None,
    *,
    output: Path,
    weights: Literal["auto", "ema", "raw"] = "auto",
    tokenizer: str | None = None,
    shards: Path | None = None,
    pipeline: str | None = None,
    format: Literal["dar", "transformers", "card"] = "dar",
) -> None:
    """Write the model of a training checkpoint in our format; with a tokenizer, a pipeline of the two.

    `config.json` of each model says whether these are EMA weights, `export.json` which checkpoint they come from. Two
    tables of places in an AR model become one, with equal logits. With format "transformers", a folder of the AR model
    alone that LlamaForCausalLM reads, of a checkpoint or of a pipeline. A pipeline's folder gets a model card,
    README.md, which format "card" writes anew. It ends with what you have written into NOTES.md beside it.

    Args:
        ckpt: a checkpoint of `dar fit`, of a tokenizer or an AR model.
        output: folder for config.json and model.safetensors, or for the pipeline.
        weights: "ema", the averaged weights; "raw", those that the optimizer works on; "auto", EMA if the run kept one.
        tokenizer: folder or Hugging Face repository of the tokenizer that an AR model's tokens came from.
        shards: for a pipeline or transformers: image or token shards whose index.json names the classes; of no use to a
            model of prompts, or of nothing.
        pipeline: for transformers and card, instead of ckpt: a folder, "fruit64" or a Hugging Face repository.
        format: "dar", ours, "transformers", or "card", the model card alone.
    """
    if format == "transformers":
        _export_llama(ckpt, output, weights, tokenizer, shards, pipeline)
        return
    if format == "card":
        require(pipeline is not None, "pipeline is missing: format 'card' writes the model card of a pipeline")
        given = [name for name, value in (("ckpt", ckpt), ("tokenizer", tokenizer), ("shards", shards)) if value]
        require(not given, f"{', '.join(given)}: format 'card' takes a pipeline alone, leave it out")
        notes = resolve_folder(pipeline) / NOTES
        text = model_card(DARPipeline.from_pretrained(pipeline), pipeline, _text(notes) or _text(output / NOTES))
        write_text(output / CARD, text)
        print(f"{output / CARD}: the model card of {pipeline}")
        return
    if pipeline is not None:
        others = "format 'transformers' or 'card'"
        raise UserError(f"pipeline is {pipeline!r}, which is in format 'dar' already: need {others}")
    require(ckpt is not None, "ckpt is missing: need a checkpoint of dar fit")
    model = load_lightning_checkpoint(ckpt, weights)
    if isinstance(model, ARModel):
        merge_place_tables(model)
    facts = {"checkpoint": str(ckpt), "ema": model.averaged}
    if tokenizer is None:
        if shards is not None:
            raise UserError("shards is set without tokenizer: class names belong to a pipeline")
        begin_work()
        model.save_pretrained(output)
        said = f"{type(model).__name__}, SHA-256 {model_sha256(model)[:12]}"
    else:
        require(isinstance(model, ARModel), f"ckpt {ckpt} is of a tokenizer: a pipeline needs that of an AR model")
        classes, takes = model.condition.num_labels, model.condition.takes
        useless = shards is not None and takes != "labels"
        require(not useless, f"shards is {str(shards)!r}: class names are of no use to a model that takes {takes}")
        decoder = SequentialDiffusionTokenizer.from_pretrained(tokenizer)
        pipe = DARPipeline(decoder, model, _classes(shards))
        begin_work()
        pipe.save_pretrained(output)
        write_text(output / CARD, model_card(pipe, str(output), _text(output / NOTES)))
        facts |= {"tokenizer": tokenizer, "tokenizer_ema": decoder.averaged}
        said = f"pipeline of {classes} classes" if takes == "labels" else f"pipeline that takes {takes}"
    write_json(output / EXPORTED, facts)
    print(f"{output}: {said}")


def _export_llama(
    ckpt: Path | None, output: Path, weights: str, tokenizer: str | None, shards: Path | None, pipeline: str | None
) -> None:
    require((ckpt is None) != (pipeline is None), "ckpt, pipeline: format 'transformers' needs one of the two")
    require(
        tokenizer is None, f"tokenizer is {tokenizer!r}: format 'transformers' holds the AR model alone, leave it out"
    )
    if pipeline is None:
        model, classes, facts = load_lightning_checkpoint(ckpt, weights), _classes(shards), {"checkpoint": str(ckpt)}
        if not isinstance(model, ARModel):
            raise UserError(f"ckpt {ckpt} is of a tokenizer: format 'transformers' needs that of an AR model")
    else:
        require(weights == "auto", f"weights is {weights!r}: a pipeline has one set of weights, leave it out")
        require(shards is None, f"shards is {str(shards)!r}: a pipeline has its classes' names, leave it out")
        source = DARPipeline.from_pretrained(pipeline)
        model, classes, facts = source.ar, source.classes, {"pipeline": pipeline}
    begin_work()
    save_llama(model, output, classes)
    write_json(output / EXPORTED, facts | {"ema": model.averaged})
    print(f"{output}: LlamaForCausalLM of ARModel, SHA-256 {model_sha256(model)[:12]}")


def _classes(shards: Path | None) -> tuple[str, ...]:
    """The classes that an index.json names."""
    return () if shards is None else tuple(read_json(shards / "index.json").get("classes", []))


def _text(path: Path) -> str:
    """What a file says; nothing where there is none."""
    return path.read_text() if path.is_file() else ""
