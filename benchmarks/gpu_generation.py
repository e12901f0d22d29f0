"""Items of `benchmarks.gpu` that draw and decode: numbers, threads, memory, a token, diffusion steps."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import tiny
from benchmarks.gpu_bench import Bench
from benchmarks.machine import describe, synchronize
from benchmarks.rows import compile_graphs
from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.ar import decode_road
from dar_lightning.ar.decode_road import choose_road
from dar_lightning.ar.sampling import generate

GUIDANCE = 4.0
ROADS = "graph, Triton", "graph", "eager"
# Times what reading weights and cache takes; XL's at 64 is what issue and docs promise.
TOKEN_GOALS = {("XL", 64): 1.6, ("B", 64): 1.9, ("XL", 1): 2.4, ("B", 1): 4.4}


def seeded(count: int) -> list[torch.Generator]:
    """A CPU generator for each of so many images."""
    return [torch.Generator().manual_seed(number) for number in range(count)]


def share(ours: Tensor, expected: Tensor) -> float:
    """Of equal entries."""
    return float((ours.cpu() == expected.cpu()).float().mean())


def error(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude."""
    return float((ours.detach().cpu() - expected).abs().max() / expected.abs().max())


def ar_model(bench: Bench, size: str) -> ARModel:
    """A new one of a preset, tiny in a rehearsal, in bfloat16."""
    with torch.device(bench.device):
        return ARModel(bench.size(ARConfig.preset(size), ARConfig(**tiny.AR))).bfloat16().eval().requires_grad_(False)


def tokenizer(bench: Bench) -> SequentialDiffusionTokenizer:
    """A new v1, tiny in a rehearsal, in bfloat16."""
    with torch.device(bench.device):
        config = bench.size(TokenizerConfig.preset("v1"), TokenizerConfig(**tiny.TOKENIZER))
        return SequentialDiffusionTokenizer(config).bfloat16().eval().requires_grad_(False)


def numbers(bench: Bench) -> Iterator[dict]:
    """The official goldens, and the shipped pipeline's tokens, in float32: on the device as on a CPU."""
    import official  # of the tests, which benchmarks.tiny has put on the path

    facts = {"machine": describe(bench.device)}
    if hasattr(torch._C, "_get_sdp_priority_order"):
        facts["attention_order"] = torch._C._get_sdp_priority_order()
    yield bench.row("machine", **facts)
    exact = dict(at_most=official.TOLERANCE, is_speed=False)
    same = dict(at_least=0.99, is_speed=False)

    golden = official.load("ar_a")
    model, labels = golden.model.to(bench.device), golden.inputs["labels"].long().to(bench.device)
    logits = model(labels, golden.inputs["tokens"].long().to(bench.device))
    yield bench.row("official AR model: error of logits", error(logits, golden.outputs["train_logits_nodrop"]), **exact)
    drawn = generate(model, labels, guidance=3.0, top_k=1)
    yield bench.row("official AR model: equal tokens", share(drawn, golden.outputs["gen1_tokens"]), **same)

    golden = official.load("tokenizer_a")
    model, codes = golden.model.to(bench.device), golden.outputs["codes"].long()
    found = model.tokenize(golden.inputs["images"].to(bench.device))
    yield bench.row("official tokenizer: equal tokens", share(found, codes), **same)
    codes = codes[: golden.config["decode_batch"]].to(bench.device)
    pixels = model.detokenize(codes, golden.inputs["decode_noise"].to(bench.device))
    yield bench.row("official tokenizer: error of pixels", error(pixels, golden.outputs["decode_adams2"]), **exact)

    pipe, count = DARPipeline.from_pretrained("fruit64"), bench.size(14, 1)
    for guidance in bench.size((1.0, (1.0, 8.0)), ((1.0, 8.0),)):
        options = dict(guidance=guidance, generator=seeded(count))
        on_cpu = generate(pipe.ar.cpu(), torch.arange(count), **options)
        options["generator"] = seeded(count)
        here = generate(pipe.ar.to(bench.device), torch.arange(count, device=bench.device), **options)
        what = f"fruit64, guidance {guidance}: tokens as on a CPU"
        yield bench.row(what, share(here, on_cpu), at_least=0.95, is_speed=False)


def resident() -> float | None:
    """Megabytes of this process in memory now, under Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1.024e-3 for line in lines if line.startswith("VmRSS")), None)


def on_new_thread(call: Callable[[], object]) -> Callable[[], object]:
    """Runs a call in a thread that does nothing else."""

    def run() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    return run


@torch.no_grad()
def threads(bench: Bench) -> Iterator[dict]:
    """Attention by cuDNN would plan anew for every length in every thread, and keep the plans (GPU without it: off)."""
    ar, batch = ar_model(bench, "XL"), bench.size(64, 2)
    labels, count = torch.zeros(batch, dtype=torch.long, device=bench.device), bench.size(64, 2)

    def draw() -> None:
        generate(ar, labels, guidance=GUIDANCE, num_tokens=count, static=False)  # each token calls attention anew
        synchronize(bench.device)

    for allowed in (False, True):
        # The package switches cuDNN's attention off while it draws: here that does nothing.
        patched = mock.patch("torch.backends.cuda.enable_cudnn_sdp") if allowed else nullcontext()
        with patched:
            draw()
            alone, before = bench.milliseconds(draw, 0), resident()
            taken = [1e3 * bench.first_seconds(on_new_thread(draw)) for _ in range(2)]
            kept = resident() - before if before else None
        what = f"XL, {count} tokens, a new thread, cuDNN {'allowed' if allowed else 'off'}"
        goals = (None, None) if allowed else (1.25, 300)
        yield bench.row(what, max(taken), "ms", floor=alone, at_most=goals[0])
        if kept is not None:
            yield bench.row(f"{what}: memory that it leaves", kept, "MB", at_most=goals[1])


def memory(bench: Bench) -> Iterator[dict]:
    """Streams and graphs that a call makes anew would strand their memory in the allocator."""
    pipe, batch = DARPipeline(tokenizer(bench), ar_model(bench, "B")), bench.size(8, 2)
    held = []
    for _ in range(6):
        pipe.generate(torch.zeros(batch, dtype=torch.long), guidance=GUIDANCE, overlap=True)
        synchronize(bench.device)
        held.append(torch.cuda.memory_reserved() / 1e6 if bench.on_gpu else resident())
    what = f"reserved after six calls (floor: after two), batch {batch}"
    yield bench.row(what, held[5], "MB", floor=held[1], at_most=1.02, after_each=[round(each) for each in held])


def bytes_of_a_token(config: ARConfig, rows: int) -> float:
    """That one bfloat16 step has to read, on average: weights of products, keys and values of all places so far."""
    matrices = config.depth * (2 * config.dim**2 + 3 * config.dim * config.ffn_dim) + config.dim * config.vocab_size
    head_dim = config.dim // config.num_heads
    matrices += config.depth * 2 * config.dim * config.kv_heads * head_dim
    cache = config.depth * 2 * rows * config.kv_heads * head_dim * (config.num_tokens + 1) / 2
    return 2 * (matrices + cache)


@contextmanager
def road(name: str) -> Iterator[bool]:
    """Draw on one of ROADS; gives the option `static` for it."""
    kernel = mock.patch.object(decode_road, "_triton_runs", return_value=False) if name == "graph" else nullcontext()
    with kernel:
        yield name != "eager"


@torch.no_grad()
def tokens(bench: Bench) -> Iterator[dict]:
    """Milliseconds of a drawn token with guidance, against reading weights and cache once: on each road.

    The goals are of the fastest one, which drawing takes by itself. Calls of the model draw fewer tokens, to save time.
    """
    for size in ("XL", "B"):
        ar = ar_model(bench, size)
        for batch, name in product((64, 1), ROADS if bench.on_gpu else ROADS[1:]):
            labels = torch.zeros(bench.size(batch, min(batch, 2)), dtype=torch.long, device=bench.device)
            with road(name) as static:
                taken = choose_road(ar, static)

                def draw(some: int, ar: ARModel = ar, labels: Tensor = labels, static: bool = static) -> Tensor:
                    return generate(ar, labels, guidance=GUIDANCE, num_tokens=some, static=static)

                count = bench.size(32, 2) if taken == "eager" else ar.config.num_tokens
                every, few = partial(draw, count), bench.size(16, 2)
                first = bench.first_seconds(every)
                floor = bench.milliseconds_of(read=bytes_of_a_token(ar.config, 2 * len(labels)))
                facts = {"road": taken, "tokens": count, "first_call_seconds": first}
                facts |= {"kernels": bench.kernels(partial(draw, few)) / few, "peak_memory_mb": bench.memory(every)}
                goal = TOKEN_GOALS[size, batch] if floor and taken == ROADS[0] else None
                milliseconds = bench.milliseconds(every) / count
            yield bench.row(f"{size}, batch {batch}, guided: {taken}", milliseconds, "ms", floor, at_most=goal, **facts)
        del ar
        bench.drop()
    yield from equal_tokens(bench)


def equal_tokens(bench: Bench) -> Iterator[dict]:
    """Tokens of each road in float32, where rounding seldom decides, against those of calls of the model."""
    ar, count = filled(ar_model(bench, "B").float()), bench.size(8, 2)
    labels = torch.zeros(count, dtype=torch.long, device=bench.device)
    draw = partial(generate, ar, labels, guidance=GUIDANCE)
    expected = draw(generator=seeded(count), static=False)
    for name in ROADS[:2] if bench.on_gpu else ROADS[1:2]:
        with road(name) as static:
            found, taken = draw(generator=seeded(count), static=static), choose_road(ar, static)
        what = f"B, {taken}: tokens as by calls"
        yield bench.row(what, share(found, expected.cpu()), at_least=0.95, is_speed=False, road=taken)


def filled(model: nn.Module) -> nn.Module:
    """A new model without the zeros at its end, which let all of it pass for equal."""
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    return model


@torch.no_grad()
def decoding(bench: Bench) -> Iterator[dict]:
    """Milliseconds of decoding all tokens by v1 in bfloat16, against its products at the device's peak.

    By calls of the decoder, by a step that is replayed, which decoding on CUDA takes by itself, and by torch's own
    CUDA graphs.
    """
    model = filled(tokenizer(bench))
    config = model.config
    flops = bench.size(2689e9, 1e9)  # an image; tests/test_counts.py
    generator = torch.Generator(bench.device).manual_seed(0)

    def call(batch: int) -> Callable[[], Tensor]:
        shape = batch, config.num_tokens
        codes = torch.randint(config.codebook_size, shape, generator=generator, device=bench.device)
        noise = model.draw_noise(batch)
        return lambda: model.detokenize(codes, noise)

    decode, ways = call(2), {"calls": False, "step": True}
    model.decoder.static = ways["calls"]
    expected = decode().cpu()
    model.decoder.static = ways["step"]
    off = error(decode(), expected)
    yield bench.row("decode v1: error of the step against calls", off, at_most=0.01, is_speed=False)
    goals = {("calls", 64): 2.2, ("step", 1): 3.0, ("step", 64): 2.2, ("CUDA graphs", 1): 3.0, ("CUDA graphs", 64): 2.2}
    for how, batches in (("calls", (1, 8, 64)), ("step", (1, 64)), ("CUDA graphs", (1, 64))):
        if how in ways:
            model.decoder.static = ways[how]
        else:
            compile_graphs(model.conditioner, model.decoder)
        for batch in batches:
            decode = call(bench.size(batch, min(batch, 2)))
            torch._dynamo.reset()  # of another batch size dynamo would make a graph for all sizes
            facts = {"first_call_seconds": bench.first_seconds(decode), "kernels": bench.kernels(decode)}
            floor = bench.milliseconds_of(flops=bench.size(batch, min(batch, 2)) * flops)
            goal = goals.get((how, batch)) if floor else None
            taken = bench.milliseconds(decode)
            yield bench.row(f"decode v1, batch {batch}, {how}", taken, "ms", floor, at_most=goal, **facts)
