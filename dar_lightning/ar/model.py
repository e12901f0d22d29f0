"""ARModel: a Llama over image tokens, after a prefix that says what to draw (a class, a caption)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.ar.conditions import Condition, make_condition
from dar_lightning.ar.config import MAX_TOKENS, ARConfig
from dar_lightning.ar.order import fixed_order
from dar_lightning.devices import no_cudnn_attention
from dar_lightning.errors import require
from dar_lightning.formats.pretrained import PretrainedMixin
from dar_lightning.layers import Generators, KVCache, draw_per_sample, rotate, run_block


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


class ARModel(nn.Module, PretrainedMixin):
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
        told = config.order == "random_per_sample" or config.place_tables != "as_needed"
        self.place_embedding = nn.Embedding(config.num_tokens, config.dim) if told else None
        own = config.place_tables == "own_and_target"
        self.own_place_embedding = nn.Embedding(config.num_tokens, config.dim) if own else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """Cosine and sine of RoPE (P - 1 + N, head_dim / 2, 2), and the order of a model that has one order (N,)."""
        config, head_dim = self.config, self.config.dim // self.config.num_heads
        frequencies = config.rope_base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(self.max_length)[:, None] * frequencies
        tables = {"rotary": torch.stack([angles.cos(), angles.sin()], dim=-1)}
        if config.order != "random_per_sample":
            tables["order"] = fixed_order(config.order, config.num_tokens, config.order_groups, config.order_seed)
        return tables

    def _apply(self, fn, recurse: bool = True):
        """Called by `to`, `cuda` and the like: casts weights, but leaves RoPE's table in float32."""
        before = self.rotary
        super()._apply(fn, recurse)
        if self.rotary.dtype != before.dtype or (before.is_meta and not self.rotary.is_meta):
            self.rotary = self.tables()["rotary"].to(self.rotary.device)
        return self

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
        if self.config.order != "random_per_sample":
            return self.order.expand(batch, -1)
        shape = batch, self.config.num_tokens
        return draw_per_sample(torch.rand, shape, generator, self.head.weight.device).argsort(dim=1, stable=True)

    def forward(self, condition: Tensor, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits of tokens 1..N under teacher forcing.

        In training mode conditions are dropped to the null one with probability class_dropout.

        Args:
            condition: a batch (B, ...) of the model's condition: class labels (B,) int64, 0..num_classes - 1, or
                null_class; caption tokens (B, P); and so on (ar.conditions).
            codes: (B, N) int64 as they are written. The last one is a target only, it is not read.
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
        return self._run(*self._sequence(condition, codes[:, :-1]), order)

    @no_cudnn_attention()
    def start(self, condition: Tensor, codes: Tensor, order: Tensor | None = None) -> tuple[Tensor, KVCache]:
        """Read the condition and the first m < N tokens, codes (B, m), into a new KV cache; arguments as in `forward`.

        Returns:
            (B, vocab_size) logits of token m + 1, and the cache.
        """
        config, weight = self.config, self.token_embedding.weight
        heads, head_dim = config.kv_heads, config.dim // config.num_heads
        cache = KVCache((config.depth, len(condition), heads, self.max_length, head_dim), weight)
        x, cache.real = self._sequence(condition, codes)
        return self._run(x, cache.real, order, cache)[:, 0], cache

    @no_cudnn_attention()
    def step(self, tokens: Tensor, cache: KVCache, order: Tensor | None = None) -> Tensor:
        """Append one token per sequence (B,); logits (B, vocab_size) of the next one."""
        return self._run(self.token_embedding(tokens)[:, None], cache.real, order, cache)[:, 0]

    def _sequence(self, condition: Tensor, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings of prefix and codes (B, m): (B, P + m, D); which places of the prefix are real, (B, P) or None."""
        prefix = self.condition(condition)
        return torch.cat([prefix.values, self.token_embedding(codes)], dim=1), prefix.real

    def _run(self, x: Tensor, real: Tensor | None, order: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """Logits of N tokens from x (B, P - 1 + N, D); with a cache, which x continues, of its last position alone."""
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
        return self.head(self.norm(x[:, before:] if cache is None else x[:, -1:])).float()

    def hidden(self, x: Tensor, real: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, L, D) after all blocks, of embeddings x (B, L, D): what another backbone would do.

        Args:
            x: the sequence from its prefix on; with a cache, what continues it.
            real: (B, P) bool, places of the prefix that may be attended to; None: all.
            cache: takes the new keys and values, and counts on.
        """
        start = 0 if cache is None else cache.length
        end = start + x.shape[1]
        mask = None
        # Without a mask attention is causal. One new token looks at everything in the cache; several need the causal
        # mask, shifted by what is cached. Padding is hidden from all but itself, or its softmax would have no key.
        if x.shape[1] > 1 and (cache is not None or real is not None):
            mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)
        if real is not None:
            seen = F.pad(real, (0, end - real.shape[1]), value=True)[:, None, None]  # (B, 1, 1, end)
            mask = seen if mask is None else mask & seen | mask.triu(start)
        rotary = self.rotary[start:end].float()  # once, not in every block
        for layer, block in enumerate(self.blocks):
            x = run_block(block, x, rotary, mask, cache, layer, recompute=self.recompute)
        if cache is not None:
            cache.length = end
        return x
