"""Tokens that are written while the picture is drawn: the same tokens, the same pictures, and an end when asked for."""

import threading
import time

import pytest
import torch
from tiny_models import make_pipeline

from dar_lightning.ahead import run_ahead
from dar_lightning.errors import UserError

LABELS = torch.tensor([0, 3, 1])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def numbers(made: list, count: int, stop: threading.Event | None = None):
    try:
        for number in range(count):
            if stop is not None:
                stop.wait(5)
            made.append(number)
            yield torch.tensor(number)
    finally:
        made.append("closed")


def test_it_runs_ahead_of_its_reader():
    made = []
    reader = run_ahead(numbers(made, 5), CPU)
    assert int(next(reader)) == 0
    for _ in range(500):
        if made[-1] == "closed":
            break
        time.sleep(0.01)
    assert made == [0, 1, 2, 3, 4, "closed"], "nobody has asked for the second one yet"
    assert [int(number) for number in reader] == [1, 2, 3, 4]


def test_closing_stops_the_work():
    made, stop = [], threading.Event()
    reader = run_ahead(numbers(made, 10**6, stop), CPU)
    stop.set()
    next(reader)
    reader.close()
    count = len(made)
    assert made[-1] == "closed"
    assert count < 10**6
    assert not any(thread.name == "run_ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("guidance", [1.0, (1.0, 4.0)])
def test_overlapping_changes_no_bit(pipe, guidance):
    def draw(overlap: bool) -> list:
        generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return list(pipe.stream(LABELS, guidance=guidance, generator=generator, overlap=overlap))

    serial, overlapped = draw(False), draw(True)
    assert [preview.group for preview in overlapped] == [1, 2, 3, 4]
    for one, other in zip(serial, overlapped, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.images, other.images)


def test_autocast_reaches_the_thread(pipe):
    def draw(overlap: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return pipe.generate(LABELS, generator=torch.Generator().manual_seed(0), overlap=overlap, top_k=1)

    assert torch.equal(draw(True), draw(False))


def test_an_error_in_the_thread_is_raised_by_the_stream(pipe):
    with pytest.raises(UserError, match=r"^labels are from 9 to 9"):
        next(pipe.stream(torch.tensor([9]), overlap=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_cancelled_stream_writes_no_more_tokens_and_leaves_the_model_as_it_was(pipe, monkeypatch, overlap):
    steps, wait = [], threading.Event()
    original = type(pipe.ar).step

    def slow(self, *args):
        if len(steps) >= 3:  # the second group
            wait.wait(5)
        steps.append(1)
        return original(self, *args)

    monkeypatch.setattr(type(pipe.ar), "step", slow)
    pipe.ar.train()
    stream = pipe.stream(LABELS, generator=torch.Generator().manual_seed(0), overlap=overlap)
    assert next(stream).group == 1
    wait.set()
    stream.close()
    assert pipe.ar.training
    count = len(steps)
    time.sleep(0.05)
    assert len(steps) == count < 7, "8 tokens cost 7 steps"
    pipe.ar.eval()
