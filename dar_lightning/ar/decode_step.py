"""One decoding step with static shapes, which CUDA replays as a graph: embed, blocks, guidance, filter, draw, write.

All that changes from token to token is on the device, the position among it, so the host launches one graph a token
and waits for nothing. On a CPU, `ar.sampling` calls the model, whose cache grows; both draw the same tokens.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.ar.decode_road import Road
from dar_lightning.ar.draw import draw_tokens, filter_logits
from dar_lightning.ar.guidance import guide
from dar_lightning.devices import kernel_settings, no_cudnn_attention
from dar_lightning.layers import Graphs, IdleSteps, recompile_limit, rotate

BUCKET = 32  # positions: without Triton, attention reads the filled ones, rounded up to a multiple of this
COMPILED_SHAPES = 256  # of one function: dynamo's own limit of 8 is for functions that change by mistake


class Plan(NamedTuple):
    """What shapes and code of a step depend on."""

    rows: int  # sequences
    guided: bool  # whether each has an unconditional one besides
    prompt: int  # positions before the first token, P
    top_k: int
    nucleus: bool  # whether top_p is below 1
    dtype: torch.dtype  # of products and of the cache
    triton: bool  # attention by our kernel, and the rest compiled
    settings: tuple = ()  # of torch that choose kernels


class Drawing(NamedTuple):
    """What is drawn, for B sequences and n = B, or 2 B with the unconditional ones after the others."""

    prompt: Tensor  # (n, P, D) embeddings before the first token
    real: Tensor | None  # (n, P) bool: which of them may be attended to; None: all
    prefix: Tensor  # (B, m) int64 given tokens
    order: Tensor  # (n, N) int64 places of the tokens
    keys: Tensor  # (B, N, 2) int32 of the random draws
    scales: list[float]  # of guidance
    guided: int  # how many of the first tokens need the unconditional sequences
    count: int  # tokens in all
    temperature: float
    top_k: int
    top_p: float


class Layer(NamedTuple):
    """Weights of a block."""

    attention_norm: Tensor
    qkv: Tensor
    out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor  # one product
    down: Tensor


class State(NamedTuple):
    """Tensors of a step that stay where they are."""

    prompt: Tensor  # (n, P, D)
    seen: Tensor  # (n, P - 1 + N) bool: positions that later ones attend to
    tokens: Tensor  # (B, N) int64, given and drawn
    order: Tensor  # (n, N) int64
    keys: Tensor  # (B, N, 2) int32
    scales: Tensor  # (N,) float32
    temperature: Tensor  # (1,) float32
    top_p: Tensor  # (1,) float32
    given: Tensor  # (1,) int64, how many of the first tokens stay as they are
    position: Tensor  # (1,) int64 of what is read next: the prompt's come first


class Size(NamedTuple):
    """Numbers of a model that its code reads."""

    heads: int
    kv_heads: int
    eps: float


steps = IdleSteps(kept=2)  # each with its cache


def draw_static(ar: nn.Module, drawing: Drawing, road: Road) -> Iterator[Tensor]:
    """Yield the tokens after the prefix, one (B,) tensor each, by a step that is kept for the next drawing."""
    weight = ar.head.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    rows, prompt = len(drawing.prefix), drawing.prompt.shape[1]
    about = (rows, len(drawing.prompt) > rows, prompt, drawing.top_k, drawing.top_p < 1, dtype)
    plan = Plan(*about, "Triton" in road, kernel_settings())
    with steps.use(ar, plan, partial(DecodeStep, ar, plan)) as step:
        step.begin(drawing)
        for index in range(1 - prompt, drawing.count):
            step.advance(both=plan.guided and index < drawing.guided)
            if index >= drawing.prefix.shape[1]:
                yield step.state.tokens[:, index].clone()


class DecodeStep:
    """A step of one model and plan: its tensors, its weights, and on CUDA its graphs.

    Weights are read where the model has them, except what is laid out anew for each drawing: gate and up, which are
    one product, and under autocast all factors.
    """

    def __init__(self, ar: nn.Module, plan: Plan):
        config, weight = ar.config, ar.head.weight
        device, tokens = weight.device, config.num_tokens
        self.plan, self.device = plan, device
        self.size = Size(config.num_heads, config.kv_heads, config.norm_eps)
        self.capacity = plan.prompt + tokens - 1
        self.copies: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self.graphs: dict[tuple[bool, int], Callable[[], None]] = {}
        self.captured = Graphs(device)
        n = plan.rows * (1 + plan.guided)
        with torch.inference_mode(False), torch.no_grad():
            new = partial(torch.zeros, device=device)
            self.layers = [self._weights(block) for block in ar.blocks]
            self.norm, self.head = ar.norm.weight.detach(), self._pack(ar.head.weight)
            self.embedding, self.rotary = ar.token_embedding.weight.detach(), ar.rotary
            tables = ar.place_embedding, ar.own_place_embedding
            self.places = tuple(table.weight.detach() for table in tables if table is not None)
            shape = 2, n, config.kv_heads, self.capacity, config.dim // config.num_heads
            self.caches = [new(shape, dtype=plan.dtype) for _ in ar.blocks]  # zeros: masked positions are read
            self.nothing = new(n, config.dim, dtype=plan.dtype)
            self.state = State(
                prompt=new(n, plan.prompt, config.dim, dtype=self.embedding.dtype),
                seen=new(n, self.capacity, dtype=torch.bool).fill_(True),
                tokens=new(plan.rows, tokens, dtype=torch.long),
                order=new(n, tokens, dtype=torch.long),
                keys=new(plan.rows, tokens, 2, dtype=torch.int32),
                scales=new(tokens),
                temperature=new(1),
                top_p=new(1),
                given=new(1, dtype=torch.long),
                position=new(1, dtype=torch.long),
            )

    def _weights(self, block: nn.Module) -> Layer:
        attention, ffn = block.attention, block.ffn
        norms = block.attention_norm.weight.detach(), block.ffn_norm.weight.detach()
        first = norms[0], self._pack(attention.qkv.weight), self._pack(attention.out.weight)
        return Layer(*first, norms[1], self._pack(ffn.gate.weight, ffn.up.weight), self._pack(ffn.down.weight))

    def _pack(self, *weights: Tensor) -> Tensor:
        """Factor of a product: the weight itself, or a copy of one or several, one below the other."""
        weights = tuple(weight.detach() for weight in weights)
        if len(weights) == 1 and weights[0].dtype == self.plan.dtype:
            return weights[0]
        rows = sum(map(len, weights))
        factor = torch.empty(rows, weights[0].shape[1], dtype=self.plan.dtype, device=self.device)
        self.copies.append((factor, weights))
        return factor

    def begin(self, drawing: Drawing) -> None:
        """Copy to the device what is drawn, and the weights that are laid out anew; go to the first position."""
        state, given = self.state, drawing.prefix.shape[1]
        with torch.inference_mode(False), torch.no_grad():
            for factor, weights in self.copies:
                for part, weight in zip(factor.split([len(weight) for weight in weights]), weights, strict=True):
                    part.copy_(weight)
            for target, source in ((state.prompt, drawing.prompt), (state.order, drawing.order)):
                target.copy_(source)
            state.seen[:, : self.plan.prompt].fill_(True)  # the last drawing's may hide some
            if drawing.real is not None:
                state.seen[:, : self.plan.prompt].copy_(drawing.real)
            state.keys.copy_(drawing.keys)
            state.tokens[:, :given].copy_(drawing.prefix)
            state.scales[: len(drawing.scales)].copy_(torch.tensor(drawing.scales, dtype=torch.float32))
            state.temperature.fill_(drawing.temperature)
            state.top_p.fill_(drawing.top_p)
            state.given.fill_(given)
            state.position.zero_()
        self.at = 0  # the position, as the host counts it

    def advance(self, both: bool) -> None:
        """Read one more position, and write the token after it; `both`: with the unconditional sequences."""
        length = self.capacity
        if not self.plan.triton:
            length = min(-(-(self.at + 1) // BUCKET) * BUCKET, length)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if (both, length) not in self.graphs:
                step = partial(self.step, both, length, compiled=self.plan.triton)
                rewind = partial(self.state.position.fill_, self.at)  # the rest is written again as it is
                with no_cudnn_attention():
                    self.graphs[both, length] = self.captured.capture(step, rewind)
            self.graphs[both, length]()
        self.at += 1

    def step(self, both: bool, length: int, compiled: bool = False) -> None:
        """What a graph holds; attention reads at most `length` positions.

        Compiled, a block is one function of its weights, so that compiling takes as long for 36 blocks as for one. A
        block returns its last product, and the next one adds it, in the kernel of its norm.
        """
        embed, run_layer, finish = map(_compiled, _PARTS) if compiled else _PARTS
        n = self.plan.rows * (1 + both)
        x, rotary = embed(self.state, self.embedding, self.places, self.rotary, n)
        added = self.nothing[:n]
        attend = _triton_attention() if self.plan.triton else partial(_attend, length=length)
        for weights, keys_values in zip(self.layers, self.caches, strict=True):
            held = keys_values[:, :n]
            x, added = run_layer(
                x, added, weights, held, self.state.seen[:n], rotary, self.state.position, self.size, attend
            )
        finish(self.state, x, added, self.norm, self.head, self.size.eps, both, self.plan.top_k, self.plan.nucleus)


def _embed(
    state: State, embedding: Tensor, places: tuple[Tensor, ...], rotary: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """What is read at the position, (n, D), and the angles of RoPE there, (1, head_dim / 2, 2).

    `places`: none, or tables (N, D) of the next token's place and, if there is one, of the read token's.
    """
    prompt = state.prompt.shape[1]
    index = state.position - (prompt - 1)  # of the token that comes next, negative before the prompt's end
    before = state.tokens.index_select(1, (index - 1).clamp(min=0))[:, 0]
    x = F.embedding(before.repeat(n // len(before)), embedding)
    first = state.prompt[:n].index_select(1, state.position.clamp(max=prompt - 1))[:, 0]
    x = torch.where(index > 0, x, first)
    for back, table in enumerate(places):
        place = F.embedding(state.order[:n].index_select(1, (index - back).clamp(min=0))[:, 0], table)
        x = torch.where(index >= back, x + place, x)
    return x, rotary.index_select(0, state.position).float()


def _layer(
    x: Tensor,
    added: Tensor,
    weights: Layer,
    held: Tensor,
    seen: Tensor,
    rotary: Tensor,
    position: Tensor,
    size: Size,
    attend: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """A block of `ar.model` on one position, x + added (n, D): the same sum in two parts."""
    x = x + added
    h = F.rms_norm(x, x.shape[-1:], weights.attention_norm, size.eps).to(held.dtype)
    h = attend(F.linear(h, weights.qkv), held, seen, rotary, position, size.heads, size.kv_heads)
    x = x + F.linear(h, weights.out)
    h = F.rms_norm(x, x.shape[-1:], weights.ffn_norm, size.eps).to(held.dtype)
    gate, up = F.linear(h, weights.gate_up).chunk(2, dim=-1)
    return x, F.linear(F.silu(gate) * up, weights.down)


def _attend(
    qkv: Tensor,
    held: Tensor,
    seen: Tensor,
    rotary: Tensor,
    position: Tensor,
    heads: int,
    kv_heads: int,
    length: int,
) -> Tensor:
    """As decode_attention, by torch's operations on the first `length` positions of the cache."""
    qk, v = qkv.unflatten(-1, (-1, 1, held.shape[-1])).split([heads + kv_heads, kv_heads], dim=1)
    q, k = rotate(qk, rotary).split([heads, kv_heads], dim=1)
    held[0].index_copy_(2, position, k)
    held[1].index_copy_(2, position, v)
    places = torch.arange(length, device=qkv.device)
    mask = (places < position) & seen[:, :length] | (places == position)  # (B, length)
    keys, values = held[:, :, :, :length]
    x = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None], enable_gqa=heads != kv_heads)
    return x.flatten(1)


def _finish(
    state: State,
    x: Tensor,
    added: Tensor,
    norm: Tensor,
    head: Tensor,
    eps: float,
    both: bool,
    top_k: int,
    nucleus: bool,
) -> None:
    """Logits, guidance, filters and draw, all in float32; write the token, unless it is given, and count on."""
    x = F.rms_norm(x + added, x.shape[-1:], norm, eps).to(head.dtype)
    logits = F.linear(x, head).float()
    index = state.position - (state.prompt.shape[1] - 1)
    place = index.clamp(min=0)
    if both:
        logits = guide(logits, state.scales.index_select(0, place))
    logits = filter_logits(logits / state.temperature, top_k, state.top_p if nucleus else 1.0)
    drawn = draw_tokens(logits, state.keys.index_select(1, place)[:, 0])[:, None]
    state.tokens.index_copy_(1, place, torch.where(index >= state.given, drawn, state.tokens.index_select(1, place)))
    state.position.add_(1)


_PARTS = _embed, _layer, _finish


@cache
def _compiled(function: Callable) -> Callable:
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments):
        with torch._dynamo.config.patch({recompile_limit(): COMPILED_SHAPES}):
            return compiled(*arguments)

    return call


@cache
def _triton_attention() -> Callable[..., Tensor]:
    from dar_lightning.ar.decode_attention import decode_attention

    return decode_attention
