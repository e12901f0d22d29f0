"""Sampling from the AR model with a KV cache: guidance, temperature, top-k, top-p; a generator that yields tokens."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.decode_step import Drawing, choose_road, draw_static
from dar_lightning.ar.draw import draw_tokens, filter_logits
from dar_lightning.ar.guidance import Guidance, GuidanceSchedule, guidance_schedule, guide, guided_tokens
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.onednn import packed
from dar_lightning.ar.order import placed
from dar_lightning.errors import require
from dar_lightning.layers import Generators


@torch.no_grad()
def stream_tokens(
    ar: ARModel,
    labels: Tensor,
    guidance: Guidance | GuidanceSchedule = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prefix: Tensor | None = None,
    generator: Generators = None,
    num_tokens: int | None = None,
    order: Tensor | None = None,
    token_groups: Sequence[int] | None = None,
    static: bool | None = None,
    bias: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yield the tokens of a batch as they are written, first those of the prefix, then one (B,) tensor per step.

    Args:
        ar: the model; it is put into evaluation mode while it draws and back afterwards.
        labels: (B,) int64 classes, or a batch (B, ...) of the model's own condition (ar.conditions).
        guidance: scale s of logits = uncond + s (cond - uncond): constant, (a, b), linear over the tokens, or another
            schedule (`ar.guidance`). After the last token that it guides, the unconditional half leaves the batch.
        temperature: divides the logits; positive.
        top_k: keep the k most likely tokens; 0 keeps all, 1 is greedy.
        top_p: keep the most likely tokens that hold this much probability, in (0, 1].
        prefix: (B, m) int64 tokens that are kept as they are (layout control), m < num_tokens.
        generator: one torch.Generator, or a list with one per sequence; None is torch's global randomness.
        num_tokens: how many tokens to draw in all; None is all N.
        order: (B, N) from `ar.draw_order`, the places of the tokens; None draws it.
        token_groups: the group of each of the N tokens, from 1, for a guidance that asks for it; None: all are of one.
        static: draw by a step of static shapes (`ar.decode_step`), or not; None does so on CUDA, where it is a graph.
        bias: gives what is added to the guided logits, (B, V), of tokens at places (B,) of the tokenizer's order; not
            with a step of static shapes.

    Raises:
        UserError: for a value outside the ranges above.
    """
    road = choose_road(ar, static if bias is None else False)
    count = ar.config.num_tokens if num_tokens is None else num_tokens
    prefix = torch.empty(len(labels), 0, dtype=torch.long) if prefix is None else prefix
    prefix = prefix.to(labels.device)
    check_options(ar.config, labels, temperature, top_k, top_p, prefix, count)
    ar.condition.check(labels)
    scales = guidance_schedule(guidance, ar.config.num_tokens, token_groups)[:count]
    batch, guided = len(labels), guided_tokens(scales)
    check_guided(ar, scales, guidance)
    order = ar.draw_order(len(labels), generator) if order is None else order
    keys = draw_keys(len(labels), ar.config.num_tokens, generator, labels.device)

    was_training = ar.training
    ar.eval()
    try:
        yield from prefix.unbind(1)
        if guided > prefix.shape[1]:
            labels = torch.cat([labels, ar.condition.null(batch)])
            prefix, order = prefix.repeat(2, 1), order.repeat(2, 1)
        if road != "eager":
            options = scales, guided, count, temperature, top_k, top_p
            prompt = ar.condition(labels)
            yield from draw_static(ar, Drawing(*prompt, prefix[:batch], order, keys, *options), road)
            return
        model = packed(ar, rows=len(labels))
        logits, cache = model.start(labels, prefix, order)
        for position in range(prefix.shape[1], count):
            logits = guide(logits, scales[position]) if position < guided else logits
            if bias is not None:
                logits = logits + bias(order[:batch, position])
            tokens = draw_tokens(filter_logits(logits / temperature, top_k, top_p), keys[:, position])
            yield tokens
            if position + 1 == guided:
                cache.keep(batch)
                order = order[:batch]
            if position + 1 < count:
                logits = model.step(tokens.repeat(2) if position + 1 < guided else tokens, cache, order)
    finally:
        ar.train(was_training)


def stream_in_place(ar: ARModel, labels: Tensor, **options) -> Iterator[Tensor]:
    """Yield the tokens of a batch in the tokenizer's order, one (B,) tensor each. Arguments as in stream_tokens.

    A model of another order than coarse to fine writes all its tokens first; with `num_tokens`, those that it has
    written so far stay in its own order.
    """
    if ar.config.order == "coarse_to_fine":
        yield from stream_tokens(ar, labels, **options)
        return
    order = options.pop("order", None)
    order = ar.draw_order(len(labels), options.get("generator")) if order is None else order
    tokens = torch.stack(list(stream_tokens(ar, labels, order=order, **options)), dim=1)
    yield from (placed(tokens, order) if tokens.shape[1] == order.shape[1] else tokens).unbind(1)


def generate(ar: ARModel, labels: Tensor, **options) -> Tensor:
    """Draw all tokens of a batch: (B, num_tokens) int64. Arguments as in stream_tokens, order as in stream_in_place."""
    return torch.stack(list(stream_in_place(ar, labels, **options)), dim=1)


def check_guided(ar: ARModel, scales: Sequence[float], guidance: Guidance | GuidanceSchedule) -> None:
    """Refuse guidance, of which these are the tokens' scales, for a model without a condition to guide by."""
    blind = guided_tokens(scales) and ar.condition.takes == "nothing"
    require(not blind, f"guidance is {guidance}: this model has no condition to guide by, leave it at 1")


def check_filter(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse what no distribution of tokens can be changed by."""
    require(temperature > 0, f"temperature is {temperature}: it must be positive (top_k=1 is greedy)")
    require(top_k >= 0, f"top_k is {top_k}: it must be 0 (off) or positive")
    require(0 < top_p <= 1, f"top_p is {top_p}: it must be in (0, 1]")


def check_options(
    config: ARConfig, labels: Tensor, temperature: float, top_k: int, top_p: float, prefix: Tensor, count: int
) -> None:
    """Refuse values outside the ranges of `stream_tokens`, whose num_tokens is `count`, for a model of this config."""
    low, high = map(int, prefix.aminmax()) if prefix.numel() else (0, 0)
    require(1 <= count <= config.num_tokens, f"num_tokens is {count}: this model draws from 1 to {config.num_tokens}")
    check_filter(temperature, top_k, top_p)
    ordered = config.order == "coarse_to_fine" or not prefix.shape[1]
    require(ordered, f"prefix: this model's order is {config.order}, which does not write the first tokens first")
    fits = len(prefix) == len(labels) and prefix.shape[1] < count
    require(fits, f"prefix is {tuple(prefix.shape)}: need ({len(labels)}, fewer than {count})")
    known = 0 <= low <= high < config.vocab_size
    require(known, f"prefix holds tokens from {low} to {high}: need 0 to {config.vocab_size - 1}")
