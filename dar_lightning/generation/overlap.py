"""Overlap of token decoding and diffusion steps: an iterator that runs ahead on a thread and a CUDA stream."""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from queue import SimpleQueue
from typing import ClassVar

import torch
from torch import Tensor


class Worker:
    """A thread, on CUDA with a stream, that lives as long as the process and does one job after the other.

    Reused (not a ThreadPoolExecutor, which may start a second one), since each stream has memory of its own, and cuDNN
    makes its plans anew in every thread.
    """

    idle: ClassVar[dict[torch.device, deque["Worker"]]] = defaultdict(deque)  # of each device, with nothing to do

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device, self._jobs = device, SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="run_ahead", daemon=True)
        self.thread.start()

    @classmethod
    def of(cls, device: torch.device) -> "Worker":
        """An idle one, or a new one where all are busy, so nobody waits for somebody else's job."""
        try:
            return cls.idle[device].pop()
        except IndexError:
            return cls(device)

    def start(self, job: Callable[[], None]) -> threading.Event:
        """Do a job that raises nothing; the event is set when it is done, and the worker free for another."""
        done = threading.Event()
        self._jobs.put((job, done))
        return done

    def _work(self) -> None:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):  # sets the device too
            while True:
                job, done = self._jobs.get()
                job()
                del job  # and with it the iterator's cache
                self.idle[self._device].append(self)
                done.set()


os.register_at_fork(after_in_child=Worker.idle.clear)  # threads stay behind


def run_ahead(tensors: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield what `tensors` yields, while a thread already makes the next ones; its errors are raised here.

    Closing the returned generator stops the work at the tensor that is being made, and waits for it.

    Args:
        tensors: an iterator; it is used and closed in the thread only.
        device: where its tensors are. On CUDA they are made on a stream beside the reader's current one.
    """
    made: SimpleQueue[tuple[Tensor | None, torch.cuda.Event | None, BaseException | None]] = SimpleQueue()
    unwanted = threading.Event()
    # The thread has neither this one's autocast, nor its device, which is its stream's.
    autocast = torch.autocast(
        device.type, torch.get_autocast_dtype(device.type), enabled=torch.is_autocast_enabled(device.type)
    )
    worker = Worker.of(device)
    side = worker.stream
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))

    def make() -> None:
        with autocast:
            try:
                try:
                    for tensor in tensors:
                        made.put((tensor, None if side is None else side.record_event(), None))
                        if unwanted.is_set():
                            break
                finally:
                    getattr(tensors, "close", lambda: None)()
                made.put((None, None, None))
            except BaseException as error:
                made.put((None, None, error))

    done = worker.start(make)
    try:
        while True:
            tensor, ready, error = made.get()
            if error is not None:
                raise error
            if tensor is None:
                return
            if side is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                tensor.record_stream(current)  # its memory is not used again before the reader is done with it
            yield tensor
    finally:
        unwanted.set()
        if threading.current_thread() is not worker.thread:  # where garbage collection may close this, too
            done.wait()
