"""Loading the official D-AR weights as our models; their names and hyperparameters, and ours for them."""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dar_lightning.ar.config import PRESETS, ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.errors import UserError, require
from dar_lightning.formats.checkpoint import PickledConfig, Weights, pick_weights, read_checkpoint
from dar_lightning.formats.pretrained import build_config, build_model
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

Source = str | Path | Mapping[str, Any]

# ---- names: ours -> official, applied in order

TOKENIZER_NAMES = [
    (r"^encoder\.patchify", "patchify"),
    (r"^encoder\.queries", "query_embedding"),
    (r"^encoder\.query_proj", "query_linear"),
    (r"^encoder\.to_latent", "quant_in_conv"),
    (r"^encoder\.blocks", "encoder_layers"),
    (r"^quantizer\.codebook", "quantize.embedding.weight"),
    (r"^conditioner\.from_latent", "quant_out_conv"),
    (r"^conditioner\.positions", "decoder_embedding"),
    (r"^conditioner\.blocks", "decoder_layers"),
    (r"^decoder\.repa_head\.0", "diff_decoder.net.repa_out.0"),
    (r"^decoder\.repa_head\.2\.0", "diff_decoder.net.repa_out.2"),
    (r"^decoder\.repa_head\.2\.2", "diff_decoder.net.repa_out.4"),
    (r"^decoder\.cond_proj", "diff_decoder.net.cond_mlp"),
    (r"^decoder\.", "diff_decoder.net."),
    (r"\.time_mlp\.", ".time_embed.mlp."),
    (r"\.cond_mlp\.([02])", r".cond_embed.\1"),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.modulation\.", ".adaLN_modulation.1."),
    (r"\.out\.", ".proj."),
    (r"(layers|blocks)\.(\d+)\.mlp\.0\.", r"\1.\2.mlp.fc1."),
    (r"(layers|blocks)\.(\d+)\.mlp\.2\.", r"\1.\2.mlp.fc2."),
]
AR_NAMES = [
    (r"^class_embedding", "cls_embedding.embedding_table"),
    (r"^token_embedding", "tok_embeddings"),
    (r"^blocks", "layers"),
    (r"^head\.", "output."),
    (r"\.attention\.qkv\.", ".attention.wqkv."),
    (r"\.attention\.out\.", ".attention.wo."),
    (r"\.ffn\.gate\.", ".feed_forward.w1."),
    (r"\.ffn\.up\.", ".feed_forward.w3."),
    (r"\.ffn\.down\.", ".feed_forward.w2."),
]
REPA_PREFIX = "diff_decoder.net.repa_out."
# Statistics and tables that are not weights.
NOT_WEIGHTS = ("quantize.codebook_used", "freqs_cis")
LINEAR_CONVOLUTIONS = ("quant_in_conv.weight", "quant_out_conv.weight")  # 1x1 there, linear layers here


def official_name(name: str, rules: list[tuple[str, str]]) -> str:
    """The official name of one of our parameters."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# ---- hyperparameters: official -> ours

TOKENIZER_KEYS = {
    "encoder_patch_size": "encoder_patch_size",
    "encoder_dim": "encoder_dim",
    "num_encoder_layers": "encoder_depth",
    "num_decoder_layers": "conditioner_depth",
    "decoder_dim": "conditioner_dim",
    "vq_dim": "codebook_dim",
    "vq_codebook_size": "codebook_size",
    "num_query_groups": "num_groups",
    "num_all_queries": "num_tokens",
    "query_low_rank": "low_rank_queries",
    "queries_per_step": "tokens_per_step",
    "sampling_resolution": "image_size",
}
DECODER_KEYS = {"dim": "decoder_dim", "patch_size": "decoder_patch_size", "depth": "decoder_depth"}
DECODER_KEYS |= {name: name for name in ("data_std", "time_shift", "repa_layer")}
TOKENIZER_OPTIONAL = {"query_low_rank", "queries_per_step", "sampling_resolution", "repa_layer"}
AR_SAME = ("vocab_size", "num_classes", "dim", "multiple_of", "rope_base", "norm_eps")
AR_KEYS = {name: name for name in AR_SAME} | {
    "block_size": "num_tokens",
    "n_layer": "depth",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "class_dropout_prob": "class_dropout",
    "token_dropout_p": "token_dropout",
    "resid_dropout_p": "residual_dropout",
    "ffn_dropout_p": "ffn_dropout",
}
AR_IGNORED = {"initializer_range", "caption_dim", "max_batch_size", "max_seq_len"}


def tokenizer_config(config: Mapping[str, Any], has_repa_head: bool) -> TokenizerConfig:
    """Our config from the official YAML as a dict, {"model": {...}}; without a REPA head in the weights, without one.

    UserError for a key that is missing, unknown, or has a value that we do not build.
    """
    origin = "official tokenizer config"
    model = _section(config, "model", origin)
    decoder = _section(model, "diff_decoder", origin)
    del model["diff_decoder"]
    steps = model.pop("num_denoising_steps", model.get("num_query_groups"))
    if steps != model.get("num_query_groups"):
        warnings.warn(f"{origin} samples in {steps} steps: pass num_steps={steps} to detokenize", stacklevel=3)
    fixed = {"vq_enable": True, "rope_base_len": 10000, "output_resolution": 0}
    values = _translate(model, TOKENIZER_KEYS, TOKENIZER_OPTIONAL, fixed, origin)
    fixed = {"in_dim": 3, "out_dim": 3, "cond_dim": model.get("decoder_dim"), "mlp_head": False}
    fixed |= {"share_time_encoding": False}
    values |= _translate(decoder, DECODER_KEYS, TOKENIZER_OPTIONAL, fixed, f"{origin}, diff_decoder")
    if not has_repa_head:
        values["repa_layer"] = None
    result = build_config(TokenizerConfig, values, origin)
    if result.tokens_per_step == result.num_tokens // result.num_groups:
        result = replace(result, tokens_per_step=None)  # our way to say it, so that equal models have equal configs
    return result


def ar_config(config: Mapping[str, Any] | None, state: Mapping[str, Tensor]) -> ARConfig:
    """Our config from the official constructor's arguments, {"dim", "n_layer", ...}, and the weights' shapes.

    Without arguments, the number of heads is that of the released model with the same width and depth. UserError for an
    unknown argument, a value that we do not build, or weights that are no AR model of a known size.
    """
    origin = "official AR config"
    needed = ("cls_embedding.embedding_table.weight", "tok_embeddings.weight")
    for name in needed:
        if getattr(state.get(name), "ndim", 0) != 2:
            raise UserError(f"weights have no matrix {name}: this is no official AR model")
    (classes, _), (vocab_size, dim) = (state[name].shape for name in needed)
    # A number that no model has so many layers for is left to stand out as an unknown name.
    layers = [int(found[1]) for name in state if (found := re.match(r"layers\.([0-9]{1,4})\.", name))]
    depth = max(layers, default=0) + 1
    shapes = {"dim": dim, "vocab_size": vocab_size, "num_classes": classes - 1, "depth": depth}
    if config is None:
        heads = [preset["num_heads"] for preset in PRESETS.values() if (preset["dim"], preset["depth"]) == (dim, depth)]
        require(heads, f"width {dim}, depth {depth} are no released size: pass config, the constructor's arguments")
        return ARConfig(**shapes, num_heads=heads[0])
    if not isinstance(config, Mapping):
        raise UserError(f"{origin} is a {type(config).__name__}: need the official constructor's arguments by name")
    arguments = {name: value for name, value in config.items() if name not in AR_IGNORED}
    hidden = arguments.pop("ffn_hidden", None)
    fixed = {"cls_token_num": 1, "model_type": "c2i", "ffn_dim_multiplier": None}
    for name in ("attn_dropout_p", "drop_path_rate"):
        if arguments.pop(name, 0):
            warnings.warn(f"{origin}: {name} acts in training only and is not built here", stacklevel=3)
    result = build_config(ARConfig, shapes | _translate(arguments, AR_KEYS, AR_KEYS, fixed, origin), origin)
    if hidden not in (None, result.ffn_dim):
        raise UserError(f"{origin}: ffn_hidden is {hidden}, dim {result.dim} gives {result.ffn_dim}")
    return result


def _section(config: Any, name: str, origin: str) -> dict[str, Any]:
    section = config.get(name) if isinstance(config, Mapping) else None
    require(isinstance(section, Mapping), f"{origin} has no section {name!r}")
    if tensors := [str(key) for key, value in section.items() if isinstance(value, Tensor)]:
        raise UserError(f"{origin}: {', '.join(tensors)} must be plain values, not tensors")
    return dict(section)


def _translate(
    values: Mapping[str, Any], keys: Mapping[str, str], optional: Collection[str], fixed: Mapping[str, Any], origin: str
) -> dict[str, Any]:
    """Official hyperparameters under our names; those in `fixed` have none, since they can only have one value here."""
    for name, value in fixed.items():
        if (given := values.get(name, value)) != value:
            raise UserError(f"{origin}: {name} is {given!r}, only {value!r} is built here")
    if unknown := sorted(str(name) for name in values if name not in {**keys, **fixed}):
        raise UserError(f"{origin} has unknown keys: {', '.join(unknown)}")
    if missing := sorted(name for name in keys if name not in values and name not in optional):
        raise UserError(f"{origin} lacks {', '.join(missing)}")
    return {ours: values[name] for name, ours in keys.items() if name in values}


# ---- loading


def load_official_tokenizer(
    source: Source, config: Mapping[str, Any] | None = None, weights: Weights = "auto"
) -> SequentialDiffusionTokenizer:
    """Load an official tokenizer, in float32 and evaluation mode.

    Args:
        source: path of a .pt or .safetensors file, or a state dict or checkpoint that is already read.
        config: the official YAML as a dict, {"model": {...}}; needed where the file carries none.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes EMA where there is one, as the official code.

    Raises:
        UserError: if the file cannot be read safely, if its config and `config` differ or are both absent, or if any
            tensor is unknown, missing, misshapen or not finite; the REPA head may be missing, with a warning.
    """
    checkpoint, origin = _read(source)
    state, averaged = pick_weights(checkpoint, weights, prefer_ema=True, origin=origin)
    has_repa_head = any(name.startswith(REPA_PREFIX) for name in state)
    carried = checkpoint.get("config")
    carried = getattr(carried, "_data", None) if isinstance(carried, PickledConfig) else carried
    configs = [tokenizer_config(each, has_repa_head) for each in (config, carried) if each is not None]
    require(configs, f"{origin} carries no config: pass config, the official YAML as a dict {{'model': {{...}}}}")
    if configs[0] != configs[-1]:
        raise UserError(f"{origin} carries a config that differs from the given one: pass none to use the file's")
    if not has_repa_head:
        warnings.warn(f"{origin} has no REPA head: the tokenizer is built without one", stacklevel=2)
    for name in LINEAR_CONVOLUTIONS:
        if isinstance(state.get(name), Tensor) and state[name].shape[2:] == (1, 1):
            state[name] = state[name][:, :, 0, 0]
    return _build(SequentialDiffusionTokenizer, configs[0], state, TOKENIZER_NAMES, origin, averaged)


def load_official_ar(source: Source, config: Mapping[str, Any] | None = None, weights: Weights = "auto") -> ARModel:
    """Load an official AR model, in float32 and evaluation mode.

    Args:
        source: path of a .pt or .safetensors file, or a state dict or checkpoint that is already read.
        config: the official constructor's arguments, {"dim", "n_layer", "n_head", ...}; None for the released sizes.
        weights: "ema" or "raw" of a training checkpoint; "auto" takes raw where both are there, as the official code.

    Raises:
        UserError: if the file cannot be read safely, if heads are neither given nor those of a released size, or if
            any tensor is unknown, missing, misshapen or not finite.
    """
    checkpoint, origin = _read(source)
    state, averaged = pick_weights(checkpoint, weights, prefer_ema=False, origin=origin)
    return _build(ARModel, ar_config(config, state), state, AR_NAMES, origin, averaged)


def _read(source: Source) -> tuple[Mapping[str, Any], str]:
    return (source, "state dict") if isinstance(source, Mapping) else (read_checkpoint(source), str(source))


def _build(model_class, config, state: dict[str, Tensor], rules: list, origin: str, averaged: bool | None):
    tensors = {name: tensor for name, tensor in state.items() if name not in NOT_WEIGHTS}
    model = build_model(model_class, config, tensors, origin, partial(official_name, rules=rules)).float().eval()
    model.averaged = averaged
    return model
