"""Hyperparameters of the autoregressive model, with the paper's sizes."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from dar_lightning.ar.order import IN_GROUPS, ORDERS, PER_SAMPLE, OrderName, fixed_order
from dar_lightning.errors import MOST_BLOCKS, check_range, require
from dar_lightning.formats.registry import check_plain

PlaceTables = Literal["as_needed", "target", "own_and_target"]
MAX_TOKENS = 2**16  # no weight's shape tells num_tokens, so a broken config is noticed here


@dataclass(frozen=True)
class ARConfig:
    """Llama over image tokens (defaults: the released B model, 111M).

    Args:
        vocab_size: number of codes.
        num_tokens: tokens per image.
        num_classes: class labels 0..num_classes - 1; the table has one more row, "no class", for guidance.
        dim: width.
        depth: number of blocks.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; None is num_heads.
        multiple_of: the SwiGLU width 2/3 * 4 * dim is rounded up to a multiple of this.
        rope_base: base of the 1-D RoPE.
        norm_eps: epsilon of RMSNorm.
        class_dropout: probability of training a sample as "no class", or as no other condition.
        token_dropout: dropout on token embeddings.
        residual_dropout: dropout on the attention branch's output.
        ffn_dropout: dropout on the feed-forward branch's output.
        order: in which order tokens are written: "coarse_to_fine" (the paper), or for ablations "reversed", "random"
            (one permutation), "interleaved" (across groups) or "random_per_sample", whose model is told by a learned
            embedding where the next token belongs; "strided_in_group" and "random_in_group" (per sample) write a group
            as a whole before the next one. training.AblationModule trains the others.
        order_groups: groups that "interleaved" and the orders in groups go over, as many as the tokens that the model
            reads belong to: with num_tokens below the data's, fewer than the tokenizer has.
        order_seed: of "random".
        tokens_per_pass: m tokens are predicted by one pass, each without knowledge of the others (ar.pass_layout). 1 is
            the paper's; a model of several has a learned vector for each target place besides.
        sequential_tokens: so many of the first tokens are predicted one a pass. Means nothing where m is 1.
        block_attention: whether the places of one pass see all of each other ("full") or the earlier ones ("causal").
        place_tables: learned vectors that tell the model where tokens belong (RAR, arXiv 2411.00776): "target", one for
            the place of the token that comes next; "own_and_target", also one for the place of the token that is read;
            "as_needed", "target" for the orders that need it and for several tokens a pass, else none.
        condition: what pictures are asked for: "class" (the paper), "none", "caption_tokens", "features" or
            "backbone_text" (ar.conditions), or the class path of your own, registered by `register_condition`.
        condition_options: arguments of its class beside the width: numbers, words, and lists of them.
        backbone: the network between embeddings and head: "llama" (the paper), "transformers", a causal language model
            of that library (ar.backbones), or the class path of your own, registered by `register_backbone`.
        backbone_options: arguments of its class: numbers, words, null, lists and mappings of them.
    """

    vocab_size: int = 16384
    num_tokens: int = 256
    num_classes: int = 1000
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    multiple_of: int = 256
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    class_dropout: float = 0.1
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    order: OrderName = "coarse_to_fine"
    order_groups: int = 8
    order_seed: int = 0
    tokens_per_pass: int = 1
    sequential_tokens: int = 0
    block_attention: Literal["full", "causal"] = "full"
    place_tables: PlaceTables = "as_needed"
    condition: str = "class"
    condition_options: dict = field(default_factory=dict, hash=False)
    backbone: str = "llama"
    backbone_options: dict = field(default_factory=dict, hash=False)

    def __post_init__(self):
        for name in ("vocab_size", "num_tokens", "num_classes", "dim", "depth", "num_heads", "kv_heads", "multiple_of"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: it must be at least 1")
        check_range(1, MOST_BLOCKS, depth=self.depth)
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}: it must be positive and finite")
        for name in ("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"):
            require(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name)}: it must be in [0, 1)")
        dim, heads, kv_heads, tokens = self.dim, self.num_heads, self.kv_heads, self.num_tokens
        require(tokens <= MAX_TOKENS, f"num_tokens is {tokens}: it must be at most {MAX_TOKENS}")
        require(dim % (2 * heads) == 0, f"dim {dim} does not give num_heads {heads} an even number of channels each")
        require(heads % kv_heads == 0, f"num_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
        require(self.order in ORDERS, f"order is {self.order!r}: choose from {', '.join(ORDERS)}")
        groups, seed = self.order_groups, self.order_seed
        divides = groups >= 1 and (self.order not in ("interleaved", *IN_GROUPS) or tokens % groups == 0)
        require(divides, f"order_groups is {groups}: it must divide num_tokens, {tokens}")
        require(0 <= seed < 2**31, f"order_seed is {seed}: it must be from 0 to {2**31 - 1}")
        tables = PlaceTables.__args__
        require(self.place_tables in tables, f"place_tables is {self.place_tables!r}: choose from {', '.join(tables)}")
        self._check_passes()
        options = self.condition_options
        fits = self.condition != "class" or not options
        require(fits, f"condition_options: condition 'class' has no {', '.join(map(str, options))}: num_classes is all")
        check_plain(options, "condition")
        check_plain(self.backbone_options, "backbone", nested=True)

    def _check_passes(self) -> None:
        size, alone, tokens = self.tokens_per_pass, self.sequential_tokens, self.num_tokens
        require(1 <= size <= tokens, f"tokens_per_pass is {size}: it must be from 1 to num_tokens, {tokens}")
        require(0 <= alone < tokens, f"sequential_tokens is {alone}: it must be from 0 to {tokens - 1}")
        need = f"it must divide num_tokens - sequential_tokens, {tokens} - {alone}"
        require((tokens - alone) % size == 0, f"tokens_per_pass is {size}: {need}")
        need = f"only our Llama predicts several, backbone is {self.backbone!r}; need 1"
        require(size == 1 or self.backbone == "llama", f"tokens_per_pass is {size}: {need}")
        own = size > 1 and self.place_tables == "own_and_target"
        require(not own, f"place_tables is own_and_target: with tokens_per_pass {size} it must be target or as_needed")
        if self.order in IN_GROUPS:
            group = tokens // self.order_groups
            whole = f"order {self.order} writes groups of {group} tokens in whole passes"
            require(group % size == 0, f"tokens_per_pass is {size}: {whole}, it must divide {group}")
            require(alone % size == 0, f"sequential_tokens is {alone}: {whole}, it must be a multiple of {size}")
        kinds = ("full", "causal")
        require(self.block_attention in kinds, f"block_attention is {self.block_attention!r}: choose full or causal")

    @property
    def passes(self) -> int:
        """Passes over the model that draw one image: w + (N - w) / m."""
        return self.sequential_tokens + (self.num_tokens - self.sequential_tokens) // self.tokens_per_pass

    def fixed_order(self) -> Tensor:
        """Places in the order of writing (ar.order): (N,) int64; where each sample has its own, the tokenizer's."""
        name = "coarse_to_fine" if self.order in PER_SAMPLE else self.order
        passes = self.tokens_per_pass, self.sequential_tokens
        return fixed_order(name, self.num_tokens, self.order_groups, self.order_seed, *passes)

    @property
    def kv_heads(self) -> int:
        """Key/value heads: num_kv_heads, or num_heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU: 2/3 * 4 * dim, rounded up to a multiple of multiple_of."""
        hidden = int(2 * 4 * self.dim / 3)
        return -(-hidden // self.multiple_of) * self.multiple_of

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ARConfig":
        """One of the paper's sizes by name ("B", "L", "XL", "XXL", ...); keyword arguments replace single values."""
        require(name in PRESETS, f"unknown AR preset {name!r}: choose from {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, as config.json and checkpoints keep them."""
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(dim=64, depth=2, num_heads=2, vocab_size=64, num_tokens=32, multiple_of=32),
    "B": dict(dim=768, depth=12, num_heads=12),
    "L": dict(dim=1024, depth=24, num_heads=16),
    "XL": dict(dim=1280, depth=36, num_heads=20),
    "XXL": dict(dim=1536, depth=48, num_heads=24),
    "XXXL": dict(dim=2560, depth=48, num_heads=40),
    "1B": dict(dim=2048, depth=22, num_heads=32),
    "3B": dict(dim=3200, depth=24, num_heads=32),
    "7B": dict(dim=4096, depth=32, num_heads=32),
}
