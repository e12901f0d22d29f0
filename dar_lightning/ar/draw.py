"""Draw of a token from logits: top-k and top-p filters, and the Gumbel-max trick."""

import torch
from torch import Tensor

from dar_lightning.ar.gumbel import exponentials


def filter_logits(logits: Tensor, top_k: int, top_p: float | Tensor) -> Tensor:
    """Set to -inf the logits (B, V) outside the k largest and outside the nucleus of mass top_p.

    A tensor top_p, (1,), is on the logits' device: nothing is copied to the host.

    Ties with the k-th are kept, except for top_k 1, which is greedy: of equal logits it keeps the first alone.
    """
    if top_k == 1:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if isinstance(top_p, Tensor) or top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token stays if the mass before it is short of top_p, so the most likely one always does.
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def draw_tokens(logits: Tensor, keys: Tensor) -> Tensor:
    """Draw one token per row from softmax(logits) by the Gumbel-max trick: (B, V), keys (B, 2) -> (B,) int64.

    The argmax of log p + G with Gumbel noise G, computed as that of p / E, where E = exp(-G) is exponential. Nothing is
    copied to the host, and where rounding changes p a little, the token seldom changes.
    """
    probabilities = logits.softmax(dim=-1)
    return (probabilities / exponentials(keys, logits.shape[-1])).argmax(dim=-1)
