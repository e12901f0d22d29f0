"""Drawing of several tokens a pass, with a KV cache, guidance per token, and each token's own random key."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dar_lightning.ar.decode_step import Drawing
from dar_lightning.ar.draw import draw_tokens, filter_logits
from dar_lightning.ar.guidance import guide
from dar_lightning.ar.onednn import packed
from dar_lightning.ar.pass_layout import pass_end

Bias = Callable[[Tensor], Tensor] | None  # places (B,) -> what is added to their logits (B, V)


def draw_passes(ar: nn.Module, drawing: Drawing, bias: Bias = None) -> Iterator[Tensor]:
    """Yield the tokens after the prefix, one (B,) tensor each, as the passes of the model's config write them.

    Of a pass that guidance ends within, the unconditional half is computed to its end.
    """
    config, batch = ar.config, len(drawing.keys)
    prompt, order, codes = drawing.prompt, drawing.order, drawing.prefix
    model = packed(ar, rows=len(prompt) * config.tokens_per_pass)
    cache, read = model.new_cache(len(prompt), drawing.real), 0  # places that the cache has
    while (start := codes.shape[1]) < drawing.count:
        end = pass_end(config, start)
        x = model.inputs(prompt, codes.repeat(len(prompt) // batch, 1), read, end)
        x = x if read else torch.cat([prompt[:, :-1], x], dim=1)
        tokens = draw_places(model.read(x, cache, order, end - start), start, drawing, bias)
        yield from tokens.unbind(1)
        codes, read = torch.cat([codes, tokens], dim=1), end
        if len(prompt) > batch and end >= drawing.guided:
            cache.keep(batch)
            prompt, order = prompt[:batch], order[:batch]


def draw_places(logits: Tensor, start: int, drawing: Drawing, bias: Bias = None) -> Tensor:
    """Draw tokens `start`, `start` + 1, ... from their logits (B or 2B, n, V), each by itself: (B, n) int64.

    Those beyond the drawing's count are left out.
    """
    batch, end = len(drawing.keys), min(start + logits.shape[1], drawing.count)
    logits = logits[:, : end - start]
    if len(logits) > batch:
        logits = guide(logits, torch.tensor(drawing.scales[start:end], device=logits.device)[:, None], drawing.combine)
    if bias is not None:
        logits = logits + torch.stack([bias(drawing.order[:batch, place]) for place in range(start, end)], dim=1)
    logits = filter_logits(logits.flatten(0, 1) / drawing.temperature, drawing.top_k, drawing.top_p)
    return draw_tokens(logits, drawing.keys[:, start:end].flatten(0, 1)).view(batch, -1)
