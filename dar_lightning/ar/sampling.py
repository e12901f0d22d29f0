"""Sampling from the AR model with a KV cache: guidance, temperature, top-k, top-p; a generator that yields tokens."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.decode_road import choose_road
from dar_lightning.ar.decode_step import Drawing, draw_static
from dar_lightning.ar.draw import draw_tokens, filter_logits
from dar_lightning.ar.guidance import Guidance, GuidanceSchedule, guide, guided_tokens, scales_and_combine
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.jacobi import check_jacobi, draw_jacobi
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.onednn import packed
from dar_lightning.ar.order import IN_GROUPS, placed, written
from dar_lightning.ar.pass_layout import check_prefix
from dar_lightning.ar.passes import draw_passes
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
    jacobi: int = 0,
) -> Iterator[Tensor]:
    """Yield the tokens of a batch as they are written, first those of the prefix, then one (B,) tensor each.

    Those of one pass come together, of a model of several tokens a pass (`config.tokens_per_pass`).

    Args:
        ar: the model; it is put into evaluation mode while it draws and back afterwards.
        labels: (B,) int64 classes, or a batch (B, ...) of the model's own condition (ar.conditions).
        guidance: scale s of logits = uncond + s (cond - uncond): constant, (a, b), linear over the tokens, or another
            schedule (`ar.guidance`). After the last token that it guides, the unconditional half leaves the batch.
        temperature: divides the logits; positive.
        top_k: keep the k most likely tokens; 0 keeps all, 1 is greedy.
        top_p: keep the most likely tokens that hold this much probability, in (0, 1].
        prefix: (B, m) int64 tokens that are kept as they are (layout control), as they are written, m < num_tokens; of
            a model of several tokens a pass, m must end a pass.
        generator: one torch.Generator, or a list with one per sequence; None is torch's global randomness.
        num_tokens: how many tokens to draw in all; None is all N.
        order: (B, N) from `ar.draw_order`, the places of the tokens; None draws it.
        token_groups: the group of each of the N tokens, from 1, for a guidance that asks for it; None: all are of one.
        static: draw by a step of static shapes (`ar.decode_step`), or not; None does so on CUDA, where it is a graph.
        bias: gives what is added to the guided logits, (B, V), of tokens at places (B,) of the tokenizer's order; not
            with a step of static shapes.
        jacobi: draw a window of so many tokens at once until they are those of drawing one by one (`ar.jacobi`), not
            with a step of static shapes; 0 is off.

    Raises:
        UserError: for a value outside the ranges above.
    """
    check_jacobi(ar.config, jacobi, static)
    require(bias is None or not static, "static is true: a bias on the logits (evidence of an image) is drawn without")
    scales, combine = scales_and_combine(guidance, ar.config.num_tokens, token_groups)
    require(combine is None or not static, f"static is true: guidance {guidance} is drawn without, leave it out")
    road = choose_road(ar, static if bias is None and not jacobi and combine is None else False)
    count = ar.config.num_tokens if num_tokens is None else num_tokens
    prefix = torch.empty(len(labels), 0, dtype=torch.long) if prefix is None else prefix
    prefix = prefix.to(labels.device)
    check_options(ar.config, labels, temperature, top_k, top_p, prefix, count)
    ar.condition.check(labels)
    scales = scales[:count]
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
        several = ar.config.tokens_per_pass > 1
        if several or jacobi or road != "eager":
            options = scales, guided, count, temperature, top_k, top_p, combine
            drawing = Drawing(*ar.condition(labels), prefix[:batch], order, keys, *options)
            if several:
                yield from draw_passes(ar, drawing, bias)
            elif jacobi:
                yield from draw_jacobi(ar, drawing, jacobi, bias)
            else:
                yield from draw_static(ar, drawing, road)
            return
        model = packed(ar, rows=len(labels))
        logits, cache = model.start(labels, prefix, order)
        for position in range(prefix.shape[1], count):
            logits = guide(logits, scales[position], combine) if position < guided else logits
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

    A prefix is in the tokenizer's order, too. A model of an order within groups writes a group first; one of another
    order than coarse to fine, all its tokens. With `num_tokens`, those that it has written so far of them stay in its
    own order.
    """
    config = ar.config
    if config.order == "coarse_to_fine":
        yield from stream_tokens(ar, labels, **options)
        return
    order = options.pop("order", None)
    order = ar.draw_order(len(labels), options.get("generator")) if order is None else order
    grouped = config.order in IN_GROUPS
    prefix = options.pop("prefix", None)
    if prefix is not None and prefix.shape[1]:
        check_prefix(config, prefix.shape[1])
        options["prefix"] = written(prefix.to(order.device), order[:, : prefix.shape[1]])
    tokens = stream_tokens(ar, labels, order=order, **options)
    size = config.num_tokens // config.order_groups if grouped else config.num_tokens
    for start in range(0, config.num_tokens, size):
        if columns := list(islice(tokens, size)):
            group, places = torch.stack(columns, dim=1), order[:, start : start + size] - start
            yield from (placed(group, places) if len(columns) == size else group).unbind(1)


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
    check_prefix(config, prefix.shape[1])
    fits = len(prefix) == len(labels) and prefix.shape[1] < count
    require(fits, f"prefix is {tuple(prefix.shape)}: need ({len(labels)}, fewer than {count})")
    known = 0 <= low <= high < config.vocab_size
    require(known, f"prefix holds tokens from {low} to {high}: need 0 to {config.vocab_size - 1}")
