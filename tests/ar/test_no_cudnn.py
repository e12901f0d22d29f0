"""Tokens are drawn without cuDNN's attention, and everything else has it as before."""

import threading

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_ar

from dar_lightning.ar import sampling
from dar_lightning.devices import no_cudnn_attention

LABELS = torch.tensor([0, 3])
enabled = torch.backends.cuda.cudnn_sdp_enabled


@pytest.mark.parametrize("before", [True, False])
def test_drawing(before, monkeypatch):
    """The model's attention; a reader of the stream has its own as before, and so has training."""
    seen, attention = [], F.scaled_dot_product_attention

    def spy(*args, **options):
        seen.append(enabled())
        return attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ar = make_ar()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        for _ in sampling.stream_tokens(ar, LABELS, guidance=2.0, prefix=torch.tensor([[1], [2]])):
            assert enabled() == before
        assert seen == [False] * 7 * len(ar.blocks), "8 tokens, of which 1 is given"
        ar(LABELS, torch.zeros(2, 8, dtype=torch.long))
        assert seen[-1] == enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_an_error_restores_it():
    with pytest.raises(ZeroDivisionError), no_cudnn_attention():
        1 / enabled()
    assert enabled()


def test_threads_that_leave_in_another_order():
    """The first one in leaves first, and takes nothing from the other."""
    inside, leave, left = threading.Event(), threading.Event(), []

    def other():
        with no_cudnn_attention():
            inside.set()
            leave.wait(60)
            left.append(enabled())

    thread = threading.Thread(target=other)
    with no_cudnn_attention():
        thread.start()
        inside.wait(60)
    assert not enabled()
    leave.set()
    thread.join()
    assert left == [False]
    assert enabled()
