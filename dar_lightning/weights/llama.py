"""The AR model as a LlamaForCausalLM folder of transformers, and back; neither way needs transformers itself.

Its token ids: the V codes, then class k of C as V + k, and "no class" as V + C. A picture is its class's id and the N
codes that follow. Both embedding tables become one; the head gets C + 1 rows of zeros, whose ids generation_config.json
suppresses. transformers' RoPE turns channel i with channel i + h/2 of a head, ours 2i with 2i + 1: within each head the
rows of queries and keys change places, and the logits stay.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError, require
from dar_lightning.files import atomic_path, read_json, write_text
from dar_lightning.formats.pretrained import (
    CONFIG_NAME,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    build_config,
    build_model,
    build_on_meta,
    compare_tensors,
    read_safetensors,
)

SECTION = "dar_lightning"  # of config.json: what a Llama's own hyperparameters do not say
INDEX_NAME = "model.safetensors.index.json"  # where transformers has split the weights
# Weights of a block that are the same in both, ours -> theirs.
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
# What decides the logits beside the weights, and what it is in transformers where config.json does not say; None where
# the weights' shapes tell.
DECIDES = {"model_type": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "num_attention_heads": 32}
DECIDES |= {"num_key_value_heads": None, "head_dim": None, "attention_bias": False, "mlp_bias": False}
DECIDES |= {"tie_word_embeddings": False}
README = """---
library_name: transformers
pipeline_tag: text-generation
tags: [d-ar, image-generation]
---

The AR model of a D-AR pipeline (Diffusion via Autoregressive Models) as a plain `LlamaForCausalLM`, written by
`dar export --format transformers` of the package `dar_lightning`. It writes the {num_tokens} tokens of a picture,
which the pipeline's tokenizer decodes: `SequentialDiffusionTokenizer.detokenize(codes)`.

Token ids: 0 to {last} are codes; class k is {vocab_size} + k, "no class" {null}. A prompt is one class id, which kept
codes may follow. Names of the classes, if there are any, are in `config.json` under `{section}`. Guidance that
changes over the tokens: `dar_lightning.ar.logits_processor`.
"""


def save_llama(ar: ARModel, folder: str | Path, classes: tuple[str, ...] = ()) -> None:
    """Write a folder that transformers' LlamaForCausalLM.from_pretrained reads, with the same logits of codes.

    Dropout is for training and does not exist there. Tokens come in the order in which the model writes them.

    Args:
        ar: the model; its dtype is kept.
        folder: made if missing; what it holds of these files is replaced.
        classes: names of the classes, which config.json keeps.

    Raises:
        UserError: if the model is told the places of its tokens or has another number of classes, or the folder cannot
            be written.
    """
    config, folder = ar.config, Path(folder)
    order = config.order
    fits = not classes or len(classes) == config.num_classes
    require(fits, f"{len(classes)} class names for an AR model of {config.num_classes} classes")
    by_class = config.condition == "class"
    require(by_class, f"condition is {config.condition!r}: only models of classes go to transformers")
    told = f"order is {order!r}" if order == "random_per_sample" else f"place_tables is {config.place_tables!r}"
    require(ar.place_embedding is None, f"{told}: a Llama is not told where its next token belongs")
    tensors = to_llama(config, {name: tensor.detach().cpu() for name, tensor in ar.state_dict().items()})
    about = {"format_version": FORMAT_VERSION, "ema": ar.averaged, "classes": list(classes), "config": config.to_dict()}
    values = llama_config(config) | {"dtype": str(ar.head.weight.dtype).removeprefix("torch."), SECTION: about}
    null = config.vocab_size + config.num_classes
    readme = README.format(**config.to_dict(), last=config.vocab_size - 1, null=null, section=SECTION)
    with atomic_path(folder / WEIGHTS_NAME) as part:
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # it comes last: an export that is cut short leaves none
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
    write_text(folder / "README.md", readme)
    write_text(folder / "generation_config.json", json.dumps(generation_config(config), indent=2) + "\n")
    write_text(folder / CONFIG_NAME, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def load_llama(folder: str | Path) -> ARModel:
    """Load the AR model from a folder of save_llama, also one that transformers has trained and saved since.

    What the head predicts for ids of classes is left behind: they are never drawn.

    Returns:
        The model on the CPU, in evaluation mode, in the dtype of its weights.

    Raises:
        UserError: if a file is missing or broken, if the folder is of another Llama, or if config.json contradicts what
            save_llama wrote of the model.
    """
    folder = Path(folder)
    origin = folder / CONFIG_NAME
    values = read_json(origin)
    about = values.get(SECTION)
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise UserError(f"{origin} has no section {SECTION!r}: need a folder of dar export --format transformers")
    version, averaged = about.get("format_version"), about.get("ema")
    require(version == FORMAT_VERSION, f"{origin}: format_version is {version!r}, need {FORMAT_VERSION}")
    require(isinstance(averaged, bool | None), f"{origin}: ema is {averaged!r}, need true, false or null")
    config = build_config(ARConfig, about["config"], origin)
    found, needed = _decisive(values), _decisive(llama_config(config))
    for name in needed:
        same = found[name] in (needed[name], None)
        require(same, f"{origin}: {name} is {found[name]!r}, its AR model needs {needed[name]!r}")
    tensors = _read_tensors(folder)
    outline = build_on_meta(ARModel, config, len(tensors), origin)
    compare_tensors(to_llama(config, outline.state_dict()), tensors, folder, "LlamaForCausalLM")
    model = build_model(ARModel, config, from_llama(config, tensors), folder)
    model.averaged = averaged
    return model.eval()


def llama_config(config: ARConfig) -> dict[str, Any]:
    """Hyperparameters of a LlamaForCausalLM that computes what an ARModel does."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size + config.num_classes + 1,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim // config.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.num_tokens + 1,
        "rope_theta": config.rope_base,  # for transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # Written out, since 1 and 2 would be a Llama's: codes that end a picture.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def generation_config(config: ARConfig) -> dict[str, Any]:
    """How transformers draws by default: N codes after the class, from the whole distribution, and never a class."""
    first, last = config.vocab_size, config.vocab_size + config.num_classes
    values = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": config.num_tokens + 1}
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return values | {"suppress_tokens": list(range(first, last + 1))}


def to_llama(config: ARConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ARModel's state dict as that of LlamaForCausalLM."""
    head, tables = state["head.weight"], [state["token_embedding.weight"], state["class_embedding.weight"]]
    tensors = {"model.embed_tokens.weight": torch.cat(tables), "model.norm.weight": state["norm.weight"]}
    tensors["lm_head.weight"] = torch.cat([head, head.new_zeros(config.num_classes + 1, config.dim)])
    channels = config.dim // config.num_heads
    for ours, theirs in _blocks(config):
        rows = [heads * channels for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
        q, k, v = state[f"{ours}.attention.qkv.weight"].split(rows)
        q, k = (_swap(each, channels // 2, 2) for each in (q, k))
        tensors |= {f"{theirs}.self_attn.{name}_proj.weight": each for name, each in zip("qkv", (q, k, v), strict=True)}
        tensors |= {f"{theirs}.{name}.weight": state[f"{ours}.{our}.weight"] for our, name in BLOCK.items()}
    return tensors


def from_llama(config: ARConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of to_llama, bit for bit; the head's rows for ids of classes are left out."""
    codes, channels = config.vocab_size, config.dim // config.num_heads
    table = tensors["model.embed_tokens.weight"]
    state = {"token_embedding.weight": table[:codes], "class_embedding.weight": table[codes:]}
    state |= {"norm.weight": tensors["model.norm.weight"], "head.weight": tensors["lm_head.weight"][:codes]}
    for ours, theirs in _blocks(config):
        q, k, v = (tensors[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv")
        q, k = (_swap(each, 2, channels // 2) for each in (q, k))
        state[f"{ours}.attention.qkv.weight"] = torch.cat([q, k, v])
        state |= {f"{ours}.{our}.weight": tensors[f"{theirs}.{name}.weight"] for our, name in BLOCK.items()}
    return state


def _blocks(config: ARConfig) -> list[tuple[str, str]]:
    return [(f"blocks.{i}", f"model.layers.{i}") for i in range(config.depth)]


def _swap(weight: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of each head, outer x inner of them, as inner x outer."""
    return weight.unflatten(0, (-1, outer, inner)).transpose(1, 2).flatten(0, 2)


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a Llama's logits beside its weights, from its config.json of transformers 4 or 5."""
    found = {name: values.get(name, default) for name, default in DECIDES.items()}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if isinstance(rope, dict):
        rope = {"rope_type": "default", "rope_theta": values.get("rope_theta", 10000.0)} | rope
    return found | {"rope_parameters": rope}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the files into which transformers has split it."""
    if (folder / WEIGHTS_NAME).exists() or not (folder / INDEX_NAME).exists():
        return read_safetensors(folder / WEIGHTS_NAME)
    places = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / INDEX_NAME}: weight_map must name the file of each tensor")
    files = sorted({Path(name).name for name in places.values()})  # beside the index, wherever it points
    return {name: tensor for file in files for name, tensor in read_safetensors(folder / file).items()}
