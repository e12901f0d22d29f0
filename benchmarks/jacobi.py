"""Jacobi sampling: how many tokens would one pass over all places accept, if all are drawn anew at once?

A token is the argmax of its logits against noise that its key fixes (`ar.gumbel`), so the tokens of sequential sampling
are a fixed point: guess all, draw every token from the guesses before it, repeat. The tokens up to the first one that
changed are final, and one more (Song et al., arXiv 2002.03629; Teng et al., arXiv 2410.01699). Tokens are the
sequential ones; what is gained is the mean number accepted a pass, which this counts for a pipeline on a CPU or GPU.
A pass reads all N places: it costs more than a cached step of one token, how much more depends on the device.

    python benchmarks/jacobi.py [--pipeline fruit64] [--per_class 8] [--guidance 1 2 4] [--output FILE.json]
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, options, record
from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar.guidance import guide
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.sampling import draw_tokens, filter_logits, generate


@torch.no_grad()
def jacobi(ar: ARModel, labels: Tensor, scale: float, generators: list[torch.Generator], top_k: int = 0) -> tuple:
    """Draw the tokens of classes (B,) by fixed-point iteration, at a constant guidance scale.

    Returns:
        (B, N) int64 tokens, and (B,) int64, the passes after which each image's tokens were all final.
    """
    batch, count = len(labels), ar.config.num_tokens
    keys = draw_keys(batch, count, generators, labels.device)
    tokens = torch.zeros(batch, count, dtype=torch.int64, device=labels.device)
    final, passes = torch.zeros_like(labels), torch.zeros_like(labels)
    both = labels if scale == 1 else torch.cat([labels, torch.full_like(labels, ar.null_class)])
    places = torch.arange(count, device=labels.device)
    while bool((final < count).any()):
        passes += final < count
        logits = ar(both, tokens.repeat(len(both) // batch, 1)).flatten(0, 1)  # ((2) B N, V)
        logits = filter_logits(guide(logits, scale) if scale != 1 else logits, top_k, 1.0)
        drawn = draw_tokens(logits, keys.flatten(0, 1)).unflatten(0, (batch, count))
        # What was drawn from final tokens alone is final: all up to the first change, and the token that changed.
        changed = (drawn != tokens) & (places >= final[:, None])
        first = torch.where(changed.any(1), changed.int().argmax(1), count)
        final, tokens = (first + 1).clamp(max=count), drawn
    return tokens, passes


def rows(pipeline: str, per_class: int, guidance: list[float]) -> Iterator[dict]:
    """Tokens accepted a pass at each guidance scale, over `per_class` images of each class."""
    ar = DARPipeline.from_pretrained(pipeline).ar.float().eval()  # in bfloat16 rounding tells the two ways apart
    labels = torch.arange(ar.config.num_classes).repeat_interleave(per_class)
    for scale in guidance:
        seeds = [[torch.Generator().manual_seed(i) for i in range(len(labels))] for _ in range(2)]
        tokens, passes = jacobi(ar, labels, scale, seeds[0])
        one = generate(ar, labels, guidance=scale, generator=seeds[1])
        accepted = ar.config.num_tokens / passes.double()
        yield {
            "guidance": scale,
            "images": len(labels),
            "tokens": ar.config.num_tokens,
            "mean passes": round(float(passes.double().mean()), 2),
            "accepted a pass": round(float(accepted.mean()), 3),
            "standard error": round(float(accepted.std() / len(labels) ** 0.5), 3),
            "images equal to sequential": int((tokens == one).all(1).sum()),
        }


if __name__ == "__main__":
    default = RESULTS / "jacobi.json"
    given = options(__doc__, pipeline="fruit64", per_class=8, guidance=[1.0, 2.0, 4.0], output=default)
    record(given.output, "Jacobi sampling", rows(given.pipeline, given.per_class, given.guidance))
