"""CUDA graphs of a step without a GPU: what is called in which order, and on which stream."""

from contextlib import contextmanager
from functools import partial
from itertools import count, cycle
from types import SimpleNamespace

import pytest
import torch

from dar_lightning import layers
from dar_lightning.layers import Graphs


class Stream(SimpleNamespace):
    def wait_stream(self, other):
        self.log.append((self.name, "waits"))


@pytest.fixture
def log(monkeypatch) -> list:
    """What is asked of torch.cuda, whose streams are three that it hands out in turn."""
    log, ring, pools = [], cycle(range(3)), count()

    @contextmanager
    def noted(name, *given, **options):
        log.append((name, *sorted(options)))
        log.extend(("on", stream.cuda_stream, options.get("pool")) for stream in [options.get("stream")] if stream)
        yield

    fake = SimpleNamespace(
        device=partial(noted, "device"),
        stream=partial(noted, "stream"),
        graph=partial(noted, "graph"),
        current_stream=lambda: Stream(name="current", log=log),
        Stream=lambda: Stream(name="side", log=log, cuda_stream=next(ring)),
        CUDAGraph=lambda: SimpleNamespace(replay="replay"),
        graph_pool_handle=lambda: next(pools),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(layers, "STREAMS", 3)
    layers._of_stream.clear()
    return log


def captured(graphs: Graphs, log: list) -> tuple[int, int]:
    """Stream and memory of one more capture."""
    log.clear()
    assert graphs.capture(lambda: None, lambda: None) == "replay"
    ((_, stream, pool),) = [entry for entry in log if entry[0] == "on"]
    return stream, pool


def test_a_capture(log):
    """The calls that warm up are undone; the graph is captured on a stream that waits, and is waited for."""
    graphs = Graphs(torch.device("cuda"))
    run, rewind, one = (partial(log.append, word) for word in ("run", "rewind", "one"))
    for warm_up, called in ((None, "run"), (one, "one")):
        log.clear()
        assert graphs.capture(run, rewind, warm_up) == "replay"
        graph = ("graph", "capture_error_mode", "pool", "stream")
        warm = [called, "rewind"] * 2
        begun = [("device",), ("side", "waits"), ("stream",), *warm]
        assert log == [*begun, ("current", "waits"), graph, ("on", 0, 0), "run"]
    assert Graphs(torch.device("cpu")).capture(run, rewind) is run


def test_streams(log):
    """One for all captures of a step, another for each other step that is alive, as far as they go."""
    first, second = Graphs(torch.device("cuda")), Graphs(torch.device("cuda"))
    assert captured(first, log) == captured(first, log) == (0, 0)
    assert captured(second, log) == captured(second, log) == (1, 1)
    third = [Graphs(torch.device("cuda")) for _ in range(1)]
    assert captured(third[0], log) == (2, 2)
    third.clear()
    assert captured(fourth := Graphs(torch.device("cuda")), log) == (2, 3), "that of one that is gone"
    assert captured(fifth := Graphs(torch.device("cuda")), log)[1] == 4, "there are no more"
    assert fifth.stream.cuda_stream in (first.stream.cuda_stream, second.stream.cuda_stream, fourth.stream.cuda_stream)
