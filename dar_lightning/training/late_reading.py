"""Reading of the device's numbers one step late, so that the host does not wait for the step at hand."""

from collections import deque

import torch
from torch import Tensor


class LateReading:
    """Numbers that each step makes on the device, as the host reads them in the step after."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def exchange(self, numbers: Tensor) -> list[float] | None:
        """Take this step's numbers (n,) and return those of the step before, None in the first step.

        On a CPU, where nothing is waited for, these are this step's own.
        """
        if numbers.device.type == "cpu":
            return numbers.tolist()
        event = None
        if numbers.device.type == "cuda":
            numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((numbers, event))
        if len(self._under_way) < 2:
            return None
        before, event = self._under_way.popleft()
        if event is not None:
            event.synchronize()
        return before.tolist()
