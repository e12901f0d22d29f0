"""Tokens that are written while the picture is drawn: the same tokens, the same pictures, and an end when asked for."""

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from tiny_models import make_pipeline

from dar_lightning.errors import UserError
from dar_lightning.generation.overlap import Worker, run_ahead

LABELS = torch.tensor([0, 3, 1])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


class Stand:
    """Stands for a CUDA stream, an event and a tensor."""

    made = 0

    def __init__(self, device=None):
        type(self).made += 1

    def record_event(self):
        return self

    def wait_stream(self, other):
        pass

    wait_event = record_stream = wait_stream


@pytest.fixture
def cuda(monkeypatch) -> Iterator[torch.device]:
    """A device of which run_ahead asks for streams, and gets stand-ins."""
    monkeypatch.setattr(Stand, "made", 0)
    monkeypatch.setattr(torch.cuda, "Stream", Stand)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    current = object.__new__(Stand)
    device = torch.device("cuda", 7)
    yield device
    del Worker.idle[device]


def items(made: list, count: int, error: Exception | None = None):
    """Yields tensors, or what stands for them; notes the thread that makes each, and the end."""
    try:
        for _ in range(count):
            made.append(threading.current_thread())
            yield object.__new__(Stand)
    finally:
        made.append("closed")
        if error is not None:
            raise error


def within(seconds: float, work: Callable[[], object]) -> None:
    """A deadlock is a failure, not a test without an end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "deadlock"


def test_it_runs_ahead_of_its_reader():
    made = []
    reader = run_ahead(items(made, 5), CPU)
    next(reader)
    for _ in range(500):
        if made[-1] == "closed":
            break
        time.sleep(0.01)
    assert len(made) == 6, "nobody has asked for the second one yet"
    assert len(list(reader)) == 4


def test_closing_stops_the_work():
    made = []
    reader = run_ahead(items(made, 10**6), CPU)
    next(reader)
    reader.close()
    assert made[-1] == "closed"
    assert len(made) < 10**6
    assert Worker.idle[CPU], "its thread waits for other work"


def test_one_stream_and_one_thread_serve_all_calls(cuda):
    made = []
    for count in (3, 1, 3, 0, 3):
        for _ in run_ahead(items(made, count), cuda):
            break  # closed half way
        list(run_ahead(items(made, count), cuda))
    assert (Stand.made, len({*made} - {"closed"})) == (1, 1)


def test_readers_beside_and_inside_each_other_do_not_wait(cuda):
    left = []

    def nested(outer):
        for tensor in outer:
            yield from run_ahead(items([], 2), cuda)
            yield tensor

    def work():
        one, other = (run_ahead(items([], 3), cuda) for _ in range(2))
        left.extend([one, other])
        next(one), next(other), next(one)  # both stay open, as two visitors' who have gone
        assert len(list(run_ahead(nested(items([], 3)), cuda))) == 9
        list(run_ahead(items([], 3), cuda))

    within(60, work)
    assert len(left) == 2
    assert Stand.made == len(Worker.idle[cuda]) <= 3, "none is lost to readers who have gone"


def test_a_failed_call_gives_its_thread_back():
    """One that fails while it is closed, too."""
    made, failed = [], []

    def work():
        for _ in range(3):
            try:
                list(run_ahead(items(made, 1, UserError("no more")), CPU))
            except UserError as error:
                failed.append(str(error))
            reader = run_ahead(items(made, 1, UserError("no more")), CPU)
            next(reader)
            reader.close()

    within(60, work)
    assert failed == ["no more"] * 3
    assert len({*made} - {"closed"}) == 1


def test_what_is_done_is_forgotten():
    class Cache:
        pass

    def holding(cache):
        yield torch.zeros(1)
        del cache

    cache = Cache()
    gone = weakref.ref(cache)
    list(run_ahead(holding(cache), CPU))
    del cache
    gc.collect()
    assert gone() is None, "the thread that waits holds nothing"


def test_a_forked_process_has_threads_of_its_own():
    list(run_ahead(items([], 1), CPU))
    assert Worker.idle[CPU]
    child = os.fork()
    if not child:
        os._exit(len(Worker.idle))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_overlapping_changes_no_bit(pipe, autocast):
    def draw(overlap: bool) -> list:
        generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(pipe.stream(LABELS, guidance=(1.0, 4.0), generator=generator, overlap=overlap))

    for group, (one, other) in enumerate(zip(draw(False), draw(True), strict=True), start=1):
        assert group == one.group == other.group
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.images, other.images)


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
