"""Jacobi sampling: many tokens guessed and drawn anew at once, until they are those of drawing one by one.

A token is a function of its logits and its key (ar.gumbel), so what is drawn one by one is a fixed point: draw each
token of a window from the guesses before it, until none changes (Song et al., arXiv 2002.03629; Teng et al., arXiv
2410.01699). A token that was drawn from final ones is final. Each pass makes one more so at least, on the shipped model
five on average; it reads the whole window, which costs little where passes are bound by memory or launches.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.decode_step import Drawing
from dar_lightning.ar.onednn import packed
from dar_lightning.ar.passes import Bias, draw_places
from dar_lightning.errors import require


def check_jacobi(config: ARConfig, window: int, static: bool | None = None) -> None:
    """UserError unless a model of this config can draw so with a window of so many tokens; 0 is off."""
    said, most, size = f"jacobi is {window}", config.num_tokens, config.tokens_per_pass
    require(0 <= window <= most, f"{said}: it must be 0 (off) or a window of up to {most} tokens")
    require(not window or size == 1, f"{said}: this model predicts {size} tokens a pass already, leave it at 0")
    own = f"{said}: it cuts the cache of our Llama, backbone is {config.backbone!r}; leave it at 0"
    require(not window or config.backbone == "llama", own)
    require(not (window and static), f"{said}: it has no step of static shapes, leave static out")


def draw_jacobi(ar: nn.Module, drawing: Drawing, window: int, bias: Bias = None) -> Iterator[Tensor]:
    """Yield the tokens after the prefix, one (B,) tensor each, when they are final for all sequences.

    A pass reads the window after the tokens that are final for all; the cache has the keys and values of these. Up to
    rounding the tokens are those of drawing one by one, in at most as many passes as tokens.
    """
    batch, count, before = len(drawing.keys), drawing.count, ar.condition.length - 1
    prompt, order = drawing.prompt, drawing.order
    base = drawing.prefix.shape[1]  # tokens that are final for all
    codes = F.pad(drawing.prefix, (0, count - base))  # the first guess is code 0
    final = torch.full((batch,), base, device=codes.device)
    places = torch.arange(count, device=codes.device)
    model = packed(ar, rows=len(prompt) * window)
    cache = model.new_cache(len(prompt), drawing.real)
    while base < count:
        end = min(base + window, count)
        first = not cache.length  # then all is read, later what follows the final tokens that are in the cache
        x = model.token_embedding(codes[:, 0 if first else base - 1 : end - 1].repeat(len(prompt) // batch, 1))
        x = torch.cat([prompt, x], dim=1) if first else x
        drawn = draw_places(model.read(x, cache, order, end - base), base, drawing, bias)
        guessed, here = codes[:, base:end], places[base:end]
        drawn = torch.where(here < final[:, None], guessed, drawn)  # rounding may not change what is final
        changed = drawn != guessed
        # drawn from unchanged ones: all up to the first that changed, and that one
        known = torch.where(changed.any(dim=1), changed.int().argmax(dim=1) + 1, end - base)
        final = torch.maximum(final, base + known)
        codes = torch.cat([codes[:, :base], drawn, codes[:, end:]], dim=1)
        start, base = base, int(final.min())
        cache.length = before + base
        yield from codes[:, start:base].unbind(1)
        if len(prompt) > batch and base >= drawing.guided:
            cache.keep(batch)
            prompt, order = prompt[:batch], order[:batch]
