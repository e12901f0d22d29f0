"""Losses of a batch under DDP: on two ranks, value and gradients of one process that has all the images."""

import pytest
import torch
import torch.distributed as dist

from dar_lightning.tokenizer.quantizers import make_quantizer
from dar_lightning.training.tokenizer import share_of_tokens

KINDS = {
    "lfq": (64, 6, {"temperature": 0.5, "commit_weight": 0.25}),
    "bsq": (64, 6, {}),
    "ibq": (48, 6, {"temperature": 0.5, "entropy_weight": 1.0}),
}
LATENTS = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 2, 4)[:, None, None]
READ = torch.arange(10) < torch.tensor([[10], [6], [3], [2]])  # the ranks read 16 and 5 tokens


def step(kind: str, rows: slice) -> tuple[float, list]:
    """The loss over these images, its gradients for all latents (zero for the others) and for the weights."""
    size, dim, options = KINDS[kind]
    torch.manual_seed(0)
    quantizer, z = make_quantizer(kind, size, dim, options), LATENTS.clone().requires_grad_()
    read = READ[rows]
    losses = quantizer(z[rows], read).losses.values()
    loss = sum((part * read).sum() / read.sum() if part.ndim else part for part in losses)
    loss = loss * share_of_tokens(read.sum())
    loss.backward()
    return float(loss), [tensor.grad for tensor in (z, *quantizer.parameters())]


def step_of_rank(kind: str) -> tuple[float, list]:
    """The same of this rank's two images, averaged over ranks as DDP does."""
    rank = dist.get_rank()
    loss, gradients = step(kind, slice(2 * rank, 2 * rank + 2))
    for tensor in (found := [torch.tensor(loss), *gradients]):
        dist.all_reduce(tensor)
        tensor /= 2
    return float(found[0]), [gradient.numpy() for gradient in found[1:]]


def in_validation() -> float:
    """One rank alone: without the other, a sum over ranks would wait for ever."""
    if dist.get_rank():
        return 0.0
    quantizer = make_quantizer("lfq", 64, 6, {})
    with torch.no_grad():
        quantizer(LATENTS)
    return float(quantizer.eval()(LATENTS).losses["batch_entropy"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(kind, pair):
    loss, gradients = step(kind, slice(None))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    for found, parts in pair.without_failure(step_of_rank, kind):
        assert found == pytest.approx(loss, rel=1e-5)
        for one, other in zip(parts, gradients, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-6)


def test_validation_waits_for_no_other_rank(pair):
    first, _ = pair.without_failure(in_validation)
    assert first == pytest.approx(float(make_quantizer("lfq", 64, 6, {}).eval()(LATENTS).losses["batch_entropy"]))
