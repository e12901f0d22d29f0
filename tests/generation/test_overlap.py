"""Tokens that are written while the picture is drawn: the same tokens, the same pictures, and an end when asked for."""

import gc
import os
import threading
import time
import weakref
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
    assert Worker.idle[CPU], "its thread waits for other work"


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
def cuda(monkeypatch) -> torch.device:
    """A device of which run_ahead asks for streams, and gets stand-ins."""
    monkeypatch.setattr(Stand, "made", 0)
    monkeypatch.setattr(torch.cuda, "Stream", Stand)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    current = object.__new__(Stand)
    device = torch.device("cuda", 7)
    yield device
    del Worker.idle[device]


def threads(used: set, count: int = 3):
    """Yields tensors, and notes the thread that makes them."""
    for _ in range(count):
        used.add(threading.current_thread())
        yield object.__new__(Stand)


def within(seconds: float, work) -> None:
    """A deadlock is a failure, not a test without an end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "deadlock"


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_one_stream_and_one_thread_serve_all_calls(cuda):
    used = set()
    for count in (3, 1, 3, 0, 3):
        for _ in run_ahead(threads(used, count), cuda):
            break  # closed half way
        list(run_ahead(threads(used, count), cuda))
    assert (Stand.made, len(used)) == (1, 1)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_readers_beside_and_inside_each_other_do_not_wait(cuda):
    used, left = set(), []

    def nested(outer):
        for tensor in outer:
            yield from run_ahead(threads(used, 2), cuda)
            yield tensor

    def work():
        one, other = (run_ahead(threads(used), cuda) for _ in range(2))
        left.extend([one, other])
        next(one), next(other), next(one)  # both stay open, as two visitors' who have gone
        assert len(list(run_ahead(nested(threads(used)), cuda))) == 9
        list(run_ahead(threads(used), cuda))

    within(60, work)
    assert len(left) == 2
    assert Stand.made == len(Worker.idle[cuda]) <= 3, "none is lost to readers who have gone"


def test_a_failed_call_gives_its_thread_back():
    """One that fails while it is closed, too."""

    def failing():
        try:
            yield from threads(used, 1)
        finally:
            raise UserError("no more")

    def work():
        for _ in range(3):
            with pytest.raises(UserError, match="no more"):
                list(run_ahead(failing(), CPU))
            reader = run_ahead(failing(), CPU)
            next(reader)
            reader.close()

    used = set()
    within(60, work)
    assert len(used) == 1


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


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_has_threads_of_its_own():
    list(run_ahead(iter([torch.zeros(1)]), CPU))
    assert Worker.idle[CPU]
    child = os.fork()
    if not child:
        os._exit(len(Worker.idle))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_overlapping_changes_no_bit(pipe):
    def draw(overlap: bool) -> list:
        generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return list(pipe.stream(LABELS, guidance=(1.0, 4.0), generator=generator, overlap=overlap))

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
