"""What streaming costs: time to the first preview, all previews against one decode, overlapping against taking turns.

    python benchmarks/stream.py [--pipeline fruit64] [--repetitions 9] [--output benchmarks/results/stream.json]

Repetitions of what is compared alternate; ratios are medians over neighbours, so that a busy machine slows both sides.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dar_lightning import DARPipeline
from dar_lightning.devices import choose_device
from dar_lightning.files import write_text

BATCHES = (1, 8)
GUIDANCE = 3.0


class Stopwatch:
    """Seconds until now, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def read(self) -> float:
        return self._now() - self.start


def stream(pipe: DARPipeline, batch: int, overlap: bool) -> tuple[float, float]:
    """Seconds to the first preview, and to the last."""
    generators = [torch.Generator().manual_seed(number) for number in range(batch)]
    labels = torch.arange(batch) % pipe.ar.config.num_classes
    watch, first = Stopwatch(pipe.device), None
    for _ in pipe.stream(labels, guidance=GUIDANCE, generator=generators, overlap=overlap):
        first = watch.read() if first is None else first
    return first, watch.read()


def decode_each(pipe: DARPipeline, codes: torch.Tensor, noise: torch.Tensor) -> None:
    """Previews as the official code gets them: a decode for each number of groups."""
    for groups in range(1, pipe.tokenizer.config.num_groups + 1):
        pipe.tokenizer.detokenize(codes, noise, groups=groups)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    watch = Stopwatch(device)
    work()
    return watch.read()


def measure(pipe: DARPipeline, batch: int, repetitions: int) -> dict:
    """One row."""
    config = pipe.tokenizer.config
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.codebook_size, (batch, config.num_tokens), generator=generator).to(pipe.device)
    noise = pipe.tokenizer.draw_noise(batch, generator)
    decoders = {
        "decode": lambda: pipe.tokenizer.detokenize(codes, noise),
        "previews": lambda: pipe.tokenizer.previews(codes, noise),
        "a_decode_each": lambda: decode_each(pipe, codes, noise),
    }
    times: dict[str, list[float]] = {name: [] for name in (*decoders, "first", "last", "first_ahead", "last_ahead")}
    for number in range(repetitions + 1):
        round_ = dict(zip(("first", "last"), stream(pipe, batch, overlap=False), strict=True))
        round_ |= dict(zip(("first_ahead", "last_ahead"), stream(pipe, batch, overlap=True), strict=True))
        round_ |= {name: seconds(work, pipe.device) for name, work in decoders.items()}
        for name, value in round_.items() if number else ():  # the first round warms up
            times[name].append(value)

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)), 3)

    return {
        "batch": batch,
        "milliseconds": {name: round(1000 * statistics.median(values), 1) for name, values in times.items()},
        "first_preview_share": ratio("first", "last"),
        "previews_to_one_decode": ratio("previews", "decode"),
        "a_decode_each_to_one_decode": ratio("a_decode_each", "decode"),
        "overlapped_to_serial": ratio("last_ahead", "last"),
    }


@torch.inference_mode()
def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="fruit64")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/stream.json")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    pipe = DARPipeline.from_pretrained(arguments.pipeline).to(device)
    load = os.getloadavg()[0]
    rows = [measure(pipe, batch, arguments.repetitions) for batch in BATCHES]
    result = {
        "what": "streaming with guidance, in milliseconds per batch",
        "pipeline": arguments.pipeline,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "other_load": round(load, 2),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "repetitions": arguments.repetitions,
        "rows": rows,
    }
    write_text(arguments.output, json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(row)


def processor() -> str:
    """Its name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
