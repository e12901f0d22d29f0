"""A causal language model of transformers (Qwen, Mistral, Llama ...) as the backbone, with or without LoRA."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub import errors
from torch import Tensor
from torch.nn import functional as F

from dar_lightning.ar.backbones.interface import Backbone, BackboneCache
from dar_lightning.ar.backbones.lora import add_lora
from dar_lightning.ar.config import ARConfig
from dar_lightning.errors import UserError, naming, one_line, require

# Decoders whose attention is causal, with RoPE, RMSNorm and nothing else that depends on places: each under test.
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "granite", "olmo2", "phi3", "smollm3")
CONFIG_ERRORS = ValueError, KeyError, TypeError, AttributeError, getattr(errors, "StrictDataclassError", ValueError)
# What the ARConfig says of them.
SIZES = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
}
CODES = "codes have a table and a head of their own, untied; leave it out"
REFUSED = {name: f"set config.{ours}" for name, ours in SIZES.items()} | {
    "vocab_size": CODES,
    "tie_word_embeddings": CODES,
    "pad_token_id": CODES,
    "auto_map": "code of others is not run",
    "quantization_config": "quantized weights are not trained",
    "attn_implementation": "attention is torch's (sdpa)",
    "dtype": "set trainer.precision",
}


class LanguageModel(Backbone):
    """The decoder of a causal language model of transformers, without its text embeddings and head.

    Sizes come from the ARConfig: dim, depth, num_heads, num_kv_heads, ffn_dim (multiple_of), norm_eps and rope_base.
    There is no dropout on branches, so residual_dropout and ffn_dropout must be 0.

    Args:
        config: of the AR model.
        length: of the longest sequence.
        model_type: one of MODEL_TYPES.
        lora_rank: rank of LoRA's adapters beside frozen linear layers; 0 trains all weights, without adapters.
        lora_alpha: their factor times the rank; None is the rank, a factor of 1.
        lora_targets: last names of the layers that have one ("q_proj"); none given: all linear layers.
        options: anything else in the model type's config, such as intermediate_size, head_dim, sliding_window,
            attention_dropout or rope_parameters.

    Raises:
        UserError: transformers or peft is missing, an option is unknown, or transformers refuses the values.
    """

    def __init__(
        self,
        config: ARConfig,
        length: int,
        model_type: str = "",
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_targets: list[str] | None = None,
        **options: Any,
    ):
        super().__init__()
        for name in ("residual_dropout", "ffn_dropout"):
            none = getattr(config, name) == 0
            require(none, f"{name} is {getattr(config, name)}: backbone 'transformers' has none, set it to 0")
        numbers = type(lora_rank) is int and lora_rank >= 0 and type(lora_alpha or 1) in (int, float)
        names = isinstance(lora_targets or [], list) and all(isinstance(name, str) for name in lora_targets or [])
        lora = f"lora_rank {lora_rank!r}, lora_alpha {lora_alpha!r}, lora_targets {lora_targets!r}"
        require(numbers and names, f"backbone_options: {lora}: need a rank from 0, a number and a list of layers")
        whole = lora_alpha is None and not lora_targets  # without a rank, all of the model would train
        fits = whole or (lora_rank and (lora_alpha is None or lora_alpha > 0))
        require(fits, f"backbone_options: {lora}: alpha must be positive, and both need lora_rank")
        values = language_model_config(config, length, model_type, options)
        try:
            # never "flash" and the like, which may be code from the Hub
            self.trunk = _transformers().AutoModel.from_config(values, attn_implementation="sdpa")
        except (AssertionError, ValueError, KeyError, TypeError, IndexError) as error:
            said = f"backbone_options: transformers makes no {model_type} of them: {one_line(error)}"
            raise UserError(said) from error
        self.trunk.set_input_embeddings(None)
        # transformers 5.18 and before call it past_key_values
        arguments = inspect.signature(self.trunk.forward).parameters
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"
        self._recomputes = False
        if lora_rank:
            add_lora(self.trunk, lora_rank, lora_rank if lora_alpha is None else lora_alpha, lora_targets or [])

    def tables(self) -> dict[str, Tensor]:
        rotary = self.trunk.rotary_emb
        made = type(rotary)(config=self.trunk.config)
        return {f"trunk.rotary_emb.{name}": table for name, table in made.named_buffers()}

    def forward(
        self, x: Tensor, real: Tensor | None = None, cache: BackboneCache | None = None, recompute: bool = False
    ) -> Tensor:
        if recompute != self._recomputes:
            name = f"checkpointing_{'enable' if recompute else 'disable'}"
            # gradient_ in older versions of transformers
            switch = getattr(self.trunk, f"activation_{name}", None) or getattr(self.trunk, f"gradient_{name}")
            switch(*[{"use_reentrant": False}] if recompute else [])
            self._recomputes = recompute
        given = {"use_cache": cache is not None}
        if cache is not None:
            given[self._cache_name] = cache.state
        if real is not None:
            read = 0 if cache is None else cache.length
            given["attention_mask"] = F.pad(real, (0, read + x.shape[1] - real.shape[1]), value=True).long()
        return self.trunk(inputs_embeds=x, **given).last_hidden_state

    def make_cache(self) -> BackboneCache:
        return LanguageModelCache(_transformers().DynamicCache(config=self.trunk.config))


class LanguageModelCache(BackboneCache):
    """transformers' own cache, which grows with the sequences."""

    def __init__(self, state: Any):
        super().__init__()
        self.state = state

    def keep(self, batch: int) -> None:
        self.state.batch_select_indices(torch.arange(batch))
        self.real = None if self.real is None else self.real[:batch]


def language_model_config(config: ARConfig, length: int, model_type: str, options: Mapping[str, Any]) -> Any:
    """transformers' config of a model type in the sizes of an ARConfig.

    Raises:
        UserError: transformers is missing, the type or an option is unknown, or transformers refuses a value.
    """
    mapping = _transformers().CONFIG_MAPPING
    known = [name for name in MODEL_TYPES if name in mapping]
    require(model_type in known, f"backbone_options: model_type is {model_type!r}: choose from {', '.join(known)}")
    kind = mapping[model_type]
    names = kind().to_dict().keys() - {"transformers_version", "architectures", "model_type"}
    for name, value in options.items():
        require(name not in REFUSED, f"backbone_options: {name} is {value!r}: {REFUSED.get(name)}")
        require(name in names, f"backbone_options: {name} is {value!r}: a {model_type} has no such option")
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    values = {theirs: getattr(config, ours) for theirs, ours in SIZES.items() if theirs != "rope_theta"}
    values |= {"num_key_value_heads": config.kv_heads, "intermediate_size": config.ffn_dim, "rope_parameters": rope}
    values |= {"vocab_size": 1, "max_position_embeddings": length}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    if "head_dim" in names:
        values["head_dim"] = config.dim // config.num_heads
    with naming(f"backbone_options: transformers has no such {model_type}", *CONFIG_ERRORS):
        return kind(**values | options)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("backbone 'transformers' needs it: pip install 'dar-lightning[transformers]'") from error
    transformers.logging.set_verbosity_error()
    return transformers
