"""An iterator of tensors that runs ahead of its reader, in a thread and on a CUDA stream of its own."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from queue import SimpleQueue

import torch
from torch import Tensor


def run_ahead(tensors: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield what `tensors` yields, which meanwhile goes on: the reader's work and the iterator's overlap.

    The values are the same, as long as the reader changes nothing that the iterator reads. Closing the returned
    generator stops the thread at the tensor that it is making, and waits for it.

    Args:
        tensors: an iterator; it is used in the thread only, and closed there.
        device: where its tensors are. On CUDA they are made on a stream beside the reader's current one.

    Raises:
        BaseException: whatever the iterator raises, in the reader's thread.
    """
    made: SimpleQueue[tuple[Tensor | None, torch.cuda.Event | None, BaseException | None]] = SimpleQueue()
    unwanted = threading.Event()
    on_cuda = device.type == "cuda"
    # A new thread starts without the autocast, and on the first CUDA device.
    autocast = torch.autocast(
        device.type, torch.get_autocast_dtype(device.type), enabled=torch.is_autocast_enabled(device.type)
    )
    side = None
    if on_cuda:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))

    def make() -> None:
        with ExitStack() as stack:
            stack.enter_context(autocast)
            if on_cuda:
                stack.enter_context(torch.cuda.stream(side))  # sets the device too
            try:
                for tensor in tensors:
                    made.put((tensor, side.record_event() if on_cuda else None, None))
                    if unwanted.is_set():
                        break
                made.put((None, None, None))
            except BaseException as error:
                made.put((None, None, error))
            finally:
                getattr(tensors, "close", lambda: None)()

    thread = threading.Thread(target=make, name="run_ahead", daemon=True)
    thread.start()
    try:
        while True:
            tensor, ready, error = made.get()
            if error is not None:
                raise error
            if tensor is None:
                return
            if on_cuda:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                tensor.record_stream(current)  # its memory is not used again before the reader is done with it
            yield tensor
    finally:
        unwanted.set()
        thread.join()
