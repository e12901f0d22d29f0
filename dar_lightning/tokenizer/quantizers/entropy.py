"""Entropy of codes, of each token and of the batch over all ranks: what keeps a codebook in use without a lookup."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-6  # probability: where all tokens agree on a bit, its logarithm has no gradient


class _Sum(torch.autograd.Function):
    """Sum over ranks of a value, and in the backward pass of its gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


def sum_over_ranks(values: Tensor, training: bool) -> Tensor:
    """Sum over all ranks, through which gradients flow back to each of them; in training alone.

    A loss of such a sum is the same on all ranks. DDP's mean of the ranks' gradients is then the gradient of that loss,
    and stays so where the ranks weight it by their shares of the tokens. In validation, where ranks need not all have
    a batch, a rank's own values come back.
    """
    meet = training and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()
    return _Sum.apply(values) if meet else values


def mean_over_tokens(values: Tensor, read: Tensor | None, training: bool) -> Tensor:
    """Mean over the tokens that are read, of all ranks in training: (B, N, F), (B, N) bool -> (F,)."""
    read = torch.ones(values.shape[:-1], device=values.device) if read is None else read.to(values.dtype)
    sums = torch.cat([(values * read[..., None]).flatten(0, -2).sum(dim=0), read.sum().view(1)])
    sums = sum_over_ranks(sums, training)
    return sums[:-1] / sums[-1]


def bit_entropies(logits: Tensor, read: Tensor | None, training: bool) -> tuple[Tensor, Tensor]:
    """Entropies (nats) of codes whose bits are independent, sums over bits instead of over 2^d codes.

    A soft assignment of a latent to the codes {-1, 1}^d by distance is a product over its channels, so a token's
    entropy is exactly the sum of its bits'. Of the batch, the sum over bits is an upper bound of the codes' entropy: it
    is largest where each bit is 1 half of the time.

    Args:
        logits: (B, N, d), log-odds of each bit.
        read: (B, N) bool, the tokens that count; None is all.
        training: whether the batch is that of all ranks.

    Returns:
        The entropy of each token (B, N), and that of the mean over the read tokens, a scalar.
    """
    bits = logits.sigmoid()
    each = (F.softplus(logits) - logits * bits).sum(dim=-1)
    mean = mean_over_tokens(bits, read, training).clamp(LEAST, 1 - LEAST)
    return each, (torch.special.entr(mean) + torch.special.entr(1 - mean)).sum()
