"""What streaming costs: time to the first preview, all previews against one decode, overlapping against taking turns.

python benchmarks/stream.py [--pipeline fruit64] [--repetitions 9] [--output benchmarks/results/stream.json]
"""

import statistics
import time

import torch

from benchmarks.machine import RESULTS, in_turns, options, ratio, record, synchronize
from dar_lightning import DARPipeline
from dar_lightning.devices import choose_device


def stream(pipe: DARPipeline, batch: int, overlap: bool) -> float:
    """Draw with guidance and decode a batch; seconds to the first preview."""
    generators = [torch.Generator().manual_seed(number) for number in range(batch)]
    labels = torch.arange(batch) % pipe.ar.config.num_classes
    start, first = time.perf_counter(), None
    for _ in pipe.stream(labels, guidance=3.0, generator=generators, overlap=overlap):
        synchronize(pipe.device)
        first = first or time.perf_counter() - start
    return first


@torch.inference_mode()
def measure(pipe: DARPipeline, batch: int, repetitions: int) -> dict:
    """One row."""
    config, tokenizer = pipe.tokenizer.config, pipe.tokenizer
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.codebook_size, (batch, config.num_tokens), generator=generator).to(pipe.device)
    noise, groups = tokenizer.draw_noise(batch, generator), range(1, config.num_groups + 1)
    first: list[float] = []
    works = {
        "decode": lambda: tokenizer.detokenize(codes, noise),
        "previews": lambda: tokenizer.previews(codes, noise),
        # as the official code gets them
        "a_decode_each": lambda: [tokenizer.detokenize(codes, noise, groups=group) for group in groups],
        "last": lambda: first.append(stream(pipe, batch, overlap=False)),
        "last_ahead": lambda: stream(pipe, batch, overlap=True),
    }
    seconds = in_turns(works, pipe.device, least=repetitions)
    seconds["first"] = first[1:]  # without the call that warms up
    return {
        "batch": batch,
        "milliseconds": {name: round(1000 * statistics.median(taken), 1) for name, taken in seconds.items()},
        "first_preview_share": ratio(seconds, "first", "last"),
        "previews_to_one_decode": ratio(seconds, "previews", "decode"),
        "a_decode_each_to_one_decode": ratio(seconds, "a_decode_each", "decode"),
        "overlapped_to_serial": ratio(seconds, "last_ahead", "last"),
    }


if __name__ == "__main__":
    given = options(__doc__, pipeline="fruit64", repetitions=9, device="auto", output=RESULTS / "stream.json")
    pipe = DARPipeline.from_pretrained(given.pipeline).to(choose_device(given.device))
    rows = (measure(pipe, batch, given.repetitions) for batch in (1, 8))
    facts = {"pipeline": given.pipeline, "repetitions": given.repetitions}
    record(given.output, "streaming with guidance, in milliseconds per batch", rows, pipe.device, **facts)
