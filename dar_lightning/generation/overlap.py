"""Overlap of token decoding and diffusion steps: an iterator that runs ahead on a thread and a CUDA stream."""

import os
import threading
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
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
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.jobs = SimpleQueue()  # pairs: a function that raises nothing, and the queue for what it returns
        self.thread = threading.Thread(target=self._work, name="run_ahead", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):  # sets the device too
            while True:
                job, made = self.jobs.get()
                end = [job()]
                del job  # and with it the iterator's cache
                self.idle[self.device].append(self)
                made.put(end.pop())
                del made


os.register_at_fork(after_in_child=Worker.idle.clear)  # threads stay behind


def run_ahead(tensors: Generator[Tensor, None, None], device: torch.device) -> Iterator[Tensor]:
    """Yield what `tensors` yields, while a thread already makes the next ones; its errors are raised here.

    Closing the returned generator stops the work at the tensor that is being made, and waits for it.

    Args:
        tensors: used and closed in the thread only.
        device: where its tensors are. On CUDA they are made on a stream beside the reader's current one.
    """
    made = SimpleQueue()  # (tensor, CUDA event), and in the end (None, error or None)
    unwanted, ended = threading.Event(), False
    # The thread has neither this one's autocast, nor its device, which is its stream's.
    autocast = torch.autocast(
        device.type, torch.get_autocast_dtype(device.type), enabled=torch.is_autocast_enabled(device.type)
    )
    try:
        worker = Worker.idle[device].pop()
    except IndexError:  # nobody waits for somebody else's job
        worker = Worker(device)
    side = worker.stream
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))

    def make() -> tuple[None, BaseException | None]:
        try:
            with autocast, closing(tensors):
                for tensor in tensors:
                    made.put((tensor, None if side is None else side.record_event()))
                    if unwanted.is_set():
                        break
        except BaseException as error:
            return None, error
        return None, None

    worker.jobs.put((make, made))
    try:
        while True:
            tensor, ready = made.get()
            if tensor is None:
                ended = True
                if ready is not None:
                    raise ready
                return
            if side is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                tensor.record_stream(current)  # its memory is not used again before the reader is done with it
            yield tensor
    finally:
        unwanted.set()
        if threading.current_thread() is not worker.thread:  # where garbage collection may close this, too
            while not ended:
                ended = made.get()[0] is None
