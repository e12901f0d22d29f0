"""A language model's folder (transformers) as the backbone that a training starts from: sizes, weights, tokenizer."""

import dataclasses
from pathlib import Path

import torch

from dar_lightning.ar.backbones.language_model import CONFIG_ERRORS, MODEL_TYPES, REFUSED, SIZES, language_model_config
from dar_lightning.ar.conditions import BackboneText
from dar_lightning.ar.conditions.backbone_text import read_tokenizer
from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.errors import naming, require
from dar_lightning.files import read_json
from dar_lightning.formats.pretrained import CONFIG_NAME, compare_tensors
from dar_lightning.weights.llama import read_tensors

TOKENIZER_NAME = "tokenizer.json"
# Of a config.json: what changes no hidden state, or is of the text tokens, which have their own table.
IGNORED = {"architectures", "transformers_version", "use_cache", "initializer_range", "pretraining_tp"}
IGNORED |= {"pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "torch_dtype", *REFUSED}


def read_backbone(config: ARConfig) -> tuple[ARConfig, Path | None]:
    """A training's config with what the folder in `backbone_options` says; and that folder, or None.

    Sizes of the config that are not its defaults must be the folder's. What comes out names no folder: checkpoints and
    exported models need none.

    Raises:
        UserError: the folder has no config.json of a model type that there is, or other sizes; or its tokenizer is
            needed and is not there.
    """
    options = dict(config.backbone_options)
    if config.backbone != "transformers" or "folder" not in options:
        return config, None
    folder = Path(str(options.pop("folder")))
    require(folder.is_dir(), f"backbone_options: folder is {folder}: no such folder")
    origin, said = folder / CONFIG_NAME, read_json(folder / CONFIG_NAME)
    model_type = said.get("model_type")
    require(model_type in MODEL_TYPES, f"{origin}: model_type is {model_type!r}: need {', '.join(MODEL_TYPES)}")
    same = options.pop("model_type", model_type) == model_type
    require(same, f"backbone_options: model_type is not {model_type!r}, which {folder} is; leave it out")
    for name in ("auto_map", "quantization_config"):
        require(not said.get(name), f"{origin}: it has {name}: {REFUSED[name]}")
    from transformers import CONFIG_MAPPING

    with naming(f"{origin}: transformers does not read it", *CONFIG_ERRORS):
        theirs = CONFIG_MAPPING[model_type].from_dict(said).to_dict()  # with what the file leaves to transformers
    rope = theirs["rope_parameters"]
    sizes = {ours: theirs[name] for name, ours in SIZES.items() if name in theirs}
    sizes |= {"rope_base": float(rope["rope_theta"]), "norm_eps": float(sizes["norm_eps"])}
    default = ARConfig()
    for name, size in sizes.items():
        mine = getattr(config, name)
        fits = mine in (getattr(default, name), size)
        require(fits, f"config.{name} is {mine}: the language model in {folder} has {size}; give that, or none")
    config = dataclasses.replace(config, **sizes)
    derived = language_model_config(config, theirs["max_position_embeddings"], model_type, {}).to_dict()
    own = {name: value for name, value in theirs.items() if name in derived and value != derived[name]}
    own = {name: value for name, value in own.items() if name not in IGNORED}
    own["max_position_embeddings"] = theirs["max_position_embeddings"]
    config = dataclasses.replace(config, backbone_options={"model_type": model_type} | own | options)
    if config.condition == "backbone_text":
        path = folder / TOKENIZER_NAME
        require(path.is_file(), f"{path} is missing: condition 'backbone_text' needs it")
        text = {"rows": theirs["vocab_size"], "tokenizer_bytes": path.stat().st_size}
        config = dataclasses.replace(config, condition_options=config.condition_options | text)
    return config, folder


def load_backbone(ar: ARModel, folder: Path) -> None:
    """Copy the weights of a language model's folder, and where prompts need it its text embeddings and tokenizer.

    Raises:
        UserError: weights are missing, are no safetensors, or do not fit; the tokenizer is another model's.
    """
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(folder).items()}
    table = {"embed_tokens.weight": tensors.pop("embed_tokens.weight", None)}
    tensors = {n: t for n, t in tensors.items() if n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")}
    wanted = {name: tensor for name, tensor in ar.backbone.trunk.state_dict().items() if ".lora_" not in name}
    compare_tensors(wanted, tensors, folder, ar.config.backbone_options["model_type"])
    ar.backbone.trunk.load_state_dict(tensors, strict=False)
    if isinstance(text := ar.condition, BackboneText):
        compare_tensors({"embed_tokens.weight": text.embedding.weight}, table, folder, "its vocabulary")
        content = (folder / TOKENIZER_NAME).read_bytes()
        last = max(read_tokenizer(content, folder / TOKENIZER_NAME).get_vocab().values())
        rows = len(text.embedding.weight)
        said = f"{folder / TOKENIZER_NAME}: it has tokens to {last}, the model's table {rows}: need its own"
        require(last < rows, said)
        with torch.no_grad():
            text.embedding.weight.copy_(table["embed_tokens.weight"])
            text.tokenizer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
