"""ARModel: a Llama over image tokens, after a prefix that says what to draw (a class, a caption)."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.ar.backbones import BackboneCache, make_backbone
from dar_lightning.ar.conditions import Condition, make_condition
from dar_lightning.ar.config import MAX_TOKENS, ARConfig
from dar_lightning.ar.order import PER_SAMPLE
from dar_lightning.ar.pass_layout import last_seen, read_by
from dar_lightning.devices import no_cudnn_attention
from dar_lightning.errors import UserError, require
from dar_lightning.formats.pretrained import PretrainedMixin
from dar_lightning.layers import Generators, KVCache, TableModule, draw_per_sample, rotate, run_block


class Attention(nn.Module):
    """Causal self-attention with fused bias-free qkv and optional grouped key/value heads."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.kv_heads
        self.head_dim = config.dim // config.num_heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads + 2 kv_heads, L, head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(qk, rotary).split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=cache is None and mask is None, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Bias-free feed-forward: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm Llama block."""

    def __init__(self, config: ARConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = SwiGLU(config.dim, config.ffn_dim)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.residual_dropout(self.attention(self.attention_norm(x), rotary, mask, cache, layer))
        return x + self.ffn_dropout(self.ffn(self.ffn_norm(x)))


class ARModel(TableModule, PretrainedMixin):
    """Llama over the token sequence (paper, section 3.2), conditioned by a prefix of P vectors (ar.conditions)."""

    config_class = ARConfig
    pipeline_part = "ar"

    def __init__(self, config: ARConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing
        options = config.condition_options | ({"num_classes": config.num_classes} if self._by_class else {})
        condition = make_condition(config.condition, config.dim, options)
        length = condition.length
        require(1 <= length <= MAX_TOKENS, f"condition {config.condition}: length is {length}, need 1 to {MAX_TOKENS}")
        self.add_module("class_embedding" if self._by_class else "condition_embedding", condition)
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.token_dropout = nn.Dropout(config.token_dropout)
        told = config.order in PER_SAMPLE or config.tokens_per_pass > 1 or config.place_tables != "as_needed"
        self.place_embedding = nn.Embedding(config.num_tokens, config.dim) if told else None
        own = config.place_tables == "own_and_target"
        self.own_place_embedding = nn.Embedding(config.num_tokens, config.dim) if own else None
        if llama := config.backbone == "llama":
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if llama else nn.Identity()
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        self.backbone = make_backbone(config, self.max_length)  # None: the blocks above
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)
        if config.tokens_per_pass > 1:  # saved: no weight's shape tells them
            self.register_buffer("passes", torch.tensor(self._passes))

    def tables(self) -> dict[str, Tensor]:
        """Our blocks' RoPE, (P - 1 + N, head_dim / 2, 2), and the order of a model that has one order (N,).

        Of a model of several tokens a pass also its layout (ar.pass_layout).
        """
        config, head_dim, tables = self.config, self.config.dim // self.config.num_heads, {}
        if self.backbone is None:
            frequencies = config.rope_base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
            angles = torch.arange(self.max_length)[:, None] * frequencies
            tables["rotary"] = torch.stack([angles.cos(), angles.sin()], dim=-1)
        if config.order not in PER_SAMPLE:
            tables["order"] = config.fixed_order()
        if config.tokens_per_pass > 1:
            tables |= {"read_by": read_by(config), "last_seen": last_seen(config, self.condition.length - 1)}
        return tables

    @property
    def _passes(self) -> list[int]:
        config = self.config
        return [config.tokens_per_pass, config.sequential_tokens, int(config.block_attention == "causal")]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """As torch's; refuses weights that were trained with another number of tokens a pass."""
        saved = state_dict.get(f"{prefix}passes")
        if self.config.tokens_per_pass > 1 and saved is not None and saved.tolist() != self._passes:
            names = "tokens_per_pass, sequential_tokens and block_attention (1: causal)"
            raise UserError(f"{names} are {self._passes} in the config: the weights were trained with {saved.tolist()}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _by_class(self) -> bool:
        return self.config.condition == "class"

    @property
    def condition(self) -> Condition:
        """What makes the prefix; a class table keeps the name that it has in released weights."""
        return self.class_embedding if self._by_class else self.condition_embedding

    @property
    def max_length(self) -> int:
        """Places of the longest sequence, P - 1 + N: the last token is drawn, but not read."""
        return self.condition.length - 1 + self.config.num_tokens

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.config.num_classes

    def draw_order(self, batch: int, generator: Generators = None) -> Tensor:
        """The order in which each sample's tokens are written (`ar.order`), as their places: (batch, N) int64."""
        config = self.config
        if config.order not in PER_SAMPLE:
            return self.order.expand(batch, -1)
        drawn = draw_per_sample(torch.rand, (batch, config.num_tokens), generator, self.head.weight.device)
        if config.order == "random_per_sample":
            return drawn.argsort(dim=1, stable=True)
        groups = drawn.unflatten(1, (config.order_groups, -1)).argsort(dim=2, stable=True)
        first = torch.arange(0, config.num_tokens, groups.shape[2], device=drawn.device)
        return (groups + first[:, None]).flatten(1)

    def forward(self, condition: Tensor, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits of tokens 1..N under teacher forcing.

        In training mode conditions are dropped to the null one with probability class_dropout.

        Args:
            condition: a batch (B, ...) of the model's condition: class labels (B,) int64, 0..num_classes - 1, or
                null_class; caption tokens (B, P); and so on (ar.conditions).
            codes: (B, N) int64 as they are written. The last one is a target only, it is not read; nor are those of
                the last pass, of a model of several tokens a pass.
            order: (B, N) int64, the codes' places; read by a model with place tables alone. None: the model's one
                order, where it has one.

        Returns:
            (B, N, vocab_size) float32, whatever the weights are: CUDA's autocast would leave the loss of bfloat16
            logits in bfloat16, and guidance multiplies their rounding.
        """
        count, most = codes.shape[1], self.config.num_tokens
        require(count <= most, f"codes hold {count} tokens: this model has at most {most}")
        if self.training and self.config.class_dropout > 0:
            batch = len(condition)
            dropped = torch.rand(batch, device=condition.device) < self.config.class_dropout
            dropped = dropped.view(batch, *[1] * (condition.dim() - 1))
            condition = torch.where(dropped, self.condition.null(batch), condition)
        if (size := self.config.tokens_per_pass) == 1:
            return self._run(*self._sequence(condition, codes[:, :-1]), order)
        alone = self.config.sequential_tokens
        whole = count <= alone or (count - alone) % size == 0  # tokens of a pass see each other's places
        require(whole, f"codes hold {count} tokens: this model predicts {size} a pass, they must end one")
        prefix = self.condition(condition)
        x = torch.cat([prefix.values[:, :-1], self.inputs(prefix.values, codes, 0, count)], dim=1)
        return self._run(x, prefix.real, order)

    def inputs(self, prompt: Tensor, codes: Tensor, start: int, end: int) -> Tensor:
        """What a model of several tokens a pass reads at places `start` to `end` - 1: (B, end - start, D).

        Args:
            prompt: (B, P, D) embeddings of the condition.
            codes: (B, t) int64 as they are written, all that these places read.
            start: the first place, from 0; place p predicts token p.
            end: behind the last place.
        """
        source = self.read_by[start:end]
        tokens = self.token_embedding(F.pad(codes, (1, 0))[:, source.clamp(min=-1) + 1])
        return torch.where((source < 0)[:, None], prompt[:, -1:], tokens)

    def new_cache(self, rows: int, real: Tensor | None = None) -> KVCache | BackboneCache:
        """An empty cache of `rows` sequences, whose condition has these real places, (rows, P) bool or None."""
        if self.backbone is not None:
            cache = self.backbone.make_cache()
        else:
            config = self.config
            shape = config.depth, rows, config.kv_heads, self.max_length, config.dim // config.num_heads
            cache = KVCache(shape, self.token_embedding.weight)
        cache.real = real
        return cache

    @no_cudnn_attention()
    def read(self, x: Tensor, cache: KVCache, order: Tensor, count: int) -> Tensor:
        """Append embeddings x (B, n, D) to a cache's sequences; logits (B, count, vocab_size) of the last places."""
        return self._run(x, cache.real, order, cache, count)

    @no_cudnn_attention()
    def start(
        self, condition: Tensor, codes: Tensor, order: Tensor | None = None
    ) -> tuple[Tensor, KVCache | BackboneCache]:
        """Read the condition and the first m < N tokens, codes (B, m), into a new KV cache; arguments as in `forward`.

        Returns:
            (B, vocab_size) logits of token m + 1, and the cache.
        """
        require(self.config.tokens_per_pass == 1, "start: it is for one token a pass, ar.passes draws several")
        x, real = self._sequence(condition, codes)
        cache = self.new_cache(len(condition), real)
        return self._run(x, real, order, cache)[:, 0], cache

    @no_cudnn_attention()
    def step(self, tokens: Tensor, cache: KVCache | BackboneCache, order: Tensor | None = None) -> Tensor:
        """Append one token per sequence (B,); logits (B, vocab_size) of the next one."""
        return self._run(self.token_embedding(tokens)[:, None], cache.real, order, cache)[:, 0]

    def _sequence(self, condition: Tensor, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings of prefix and codes (B, m): (B, P + m, D); which places of the prefix are real, (B, P) or None."""
        prefix = self.condition(condition)
        return torch.cat([prefix.values, self.token_embedding(codes)], dim=1), prefix.real

    def _run(
        self, x: Tensor, real: Tensor | None, order: Tensor | None, cache: KVCache | None = None, count: int = 1
    ) -> Tensor:
        """Logits of N tokens from x (B, P - 1 + N, D); with a cache, which x continues, of its last `count` places."""
        before = self.condition.length - 1  # places that predict no token
        x = self.token_dropout(x)
        if self.place_embedding is not None:
            order = self.order[None] if order is None else order
            start = (0 if cache is None else cache.length) - before  # of x in the written sequence
            places = order[:, max(start, 0) : start + x.shape[1]]  # of the tokens that come next
            told = F.pad(self.place_embedding(places), (0, 0, x.shape[1] - places.shape[1], 0))
            if self.own_place_embedding is not None:
                places = order[:, max(start - 1, 0) : start - 1 + x.shape[1]]  # of the tokens that are read
                told = told + F.pad(self.own_place_embedding(places), (0, 0, x.shape[1] - places.shape[1], 0))
            x = x + told
        x = self.hidden(x, real, cache)
        return self.head(self.norm(x[:, before:] if cache is None else x[:, -count:])).float()

    def hidden(self, x: Tensor, real: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, L, D) after all blocks, of embeddings x (B, L, D).

        Args:
            x: the sequence from its prefix on; with a cache, what continues it.
            real: (B, P) bool, places of the prefix that may be attended to; None: all.
            cache: takes the new keys and values, and counts on.
        """
        start = 0 if cache is None else cache.length
        end = start + x.shape[1]
        if self.backbone is not None:
            x = self.backbone(x, real, cache, self.recompute)
            if cache is not None:
                cache.length = end
            return x
        mask = None
        # Without a mask attention is causal. One new token looks at everything in the cache; several need the causal
        # mask, shifted by what is cached. Padding is hidden from all but itself, or its softmax would have no key.
        blocks = self.config.tokens_per_pass > 1 and self.config.block_attention == "full"
        if x.shape[1] > 1 and (cache is not None or real is not None or blocks):
            mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)
            if blocks:
                mask = torch.arange(end, device=x.device) <= self.last_seen[start:end, None]
        if real is not None:
            seen = F.pad(real, (0, end - real.shape[1]), value=True)[:, None, None]  # (B, 1, 1, end)
            mask = seen if mask is None else mask & seen | mask.triu(start)
        rotary = self.rotary[start:end].float()  # once, not in every block
        for layer, block in enumerate(self.blocks):
            x = run_block(block, x, rotary, mask, cache, layer, recompute=self.recompute)
        if cache is not None:
            cache.length = end
        return x


def merge_place_tables(ar: ARModel) -> None:
    """Add the table of read tokens' places to that of their successors', in place; logits in the model's order stay.

    In one order o, what is read before the token at place o(p) is always the token at place o(p - 1), so one vector
    stands for both (RAR, arXiv 2411.00776, section 3): U[o(p)] = target[o(p)] + own[o(p - 1)]. Other orders can be
    written no more. Nothing is done where there are no two tables, or no one order (config.order "random_per_sample").
    """
    if ar.own_place_embedding is None or "order" not in ar.tables():
        return
    with torch.no_grad():
        ar.place_embedding.weight[ar.order[1:]] += ar.own_place_embedding.weight[ar.order[:-1]]
    ar.own_place_embedding = None
    ar.config = replace(ar.config, place_tables="target")
