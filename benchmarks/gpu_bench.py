"""What the items of `benchmarks.gpu` share: the device, sizes, timing, counted kernels and waits, judged rows."""

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import in_turns, synchronize
from benchmarks.measure import peak_memory, start_memory

# Part of the device's name -> dense bfloat16 FLOP/s by its data sheet, and bytes/s that reading memory comes to: nine
# tenths of the data sheet's.
PEAKS = {"H200": (989e12, 4.3e12), "H100 NVL": (835e12, 3.5e12), "H100 PCIe": (756e12, 1.8e12)}
PEAKS |= {"H100": (989e12, 3.0e12), "A100": (312e12, 1.8e12)}
REHEARSED = (1e11, 1e10)  # of a CPU, so that the arithmetic runs


@dataclass(frozen=True)
class Bench:
    """Where and how large the items run."""

    device: torch.device
    full: bool  # the sizes of a GPU, or tiny ones
    folder: Path  # for files, removed afterwards

    def size(self, full: Any, tiny: Any) -> Any:
        """One of two."""
        return full if self.full else tiny

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.type == "cuda"

    @property
    def peaks(self) -> tuple[float, float] | None:
        """FLOP/s and bytes/s of the device, None for one that the table does not have."""
        if not self.on_gpu:
            return REHEARSED
        name = torch.cuda.get_device_name(self.device)
        return next((peaks for part, peaks in PEAKS.items() if part in name), None)

    def milliseconds_of(self, flops: float = 0.0, read: float = 0.0) -> float | None:
        """The least that so many operations, or bytes that are read, can take."""
        return self.peaks and 1e3 * max(flops / self.peaks[0], read / self.peaks[1])

    def milliseconds(self, call: Callable[[], object], budget: float = 2.0) -> float:
        """Median of a call that has been made before; in a rehearsal, of one."""
        times = dict(budget=budget, least=3) if self.full else dict(least=1)
        return 1e3 * statistics.median(in_turns({"call": call}, self.device, warm=True, **times)["call"])

    def first_seconds(self, call: Callable[[], object]) -> float:
        """Of a first call, with all that is compiled and captured in it."""
        return round(in_turns({"call": call}, self.device, least=1, warm=True)["call"][0], 2)

    def kernels(self, call: Callable[[], object]) -> int:
        """Kernels and copies that a call puts on a GPU; of a CPU, operations."""
        activity = ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as found:
            call()
            synchronize(self.device)
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        return sum(event.count for event in found.key_averages() if event.device_type == kind)

    def waits(self, call: Callable[[], object]) -> int:
        """How often a call makes the host wait for the GPU; 0 on a CPU."""
        synchronize(self.device)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if self.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                if self.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)

    def memory(self, call: Callable[[], object]) -> float | None:
        """Peak of a call in megabytes: allocated on a GPU, of the process on a CPU."""
        start_memory(self.device)
        call()
        synchronize(self.device)
        return peak_memory(self.device)

    def row(
        self,
        what: str,
        value: float | None = None,
        unit: str = "",
        floor: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
        is_speed: bool = True,
        **facts,
    ) -> dict:
        """A result, judged by its goal.

        The goal is of the ratio value / floor where something gives a floor, else of the value. Speeds and memory are
        judged at full size alone.
        """
        judged = value if floor is None else value / floor
        goals = [(sign, goal) for sign, goal in (("<=", at_most), (">=", at_least)) if goal is not None]
        met = all(judged <= goal if sign == "<=" else judged >= goal for sign, goal in goals)
        found = {"what": what, "value": value, "unit": unit, "floor": floor, "ratio": None if floor is None else judged}
        found["goal"] = ", ".join(f"{'value' if floor is None else 'ratio'} {sign} {goal:.3g}" for sign, goal in goals)
        return found | {"passed": met if goals and (self.full or not is_speed) else None} | facts

    def drop(self) -> None:
        """Give back what nobody holds."""
        start_memory(self.device)  # collects garbage
        if self.on_gpu:
            torch.cuda.empty_cache()
