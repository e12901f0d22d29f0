"""Ratios by the clock, on a CPU: the package against plain versions, in interleaved pairs of one process.

Each comparison runs its two sides in turn, the order changing from pair to pair, and its ratio is the median over
pairs: a busy machine slows both sides. Where matrix products or memory leave little to gain, `bare` runs the products
of both sides alone, in the same pairs: its ratio is what the machine allows.
"""

import copy
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import counting, plain
from benchmarks.machine import RESULTS, in_turns, options, ratio, record
from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.ar.sampling import generate
from dar_lightning.layers import compile_blocks
from dar_lightning.tokenizer.quantizers.vector import BLOCK, CPU_TILE, VectorQuantizer

LEAST_PAIRS, MOST_PAIRS = 3, 31
ROW_KEYS = {
    "row",
    "what",
    "goal",
    "at_most",
    "ratio",
    "bare_ratio",
    "pairs",
    "milliseconds",
    "gflops",
    "share_of_limit",
}


class Sides(NamedTuple):
    """What is compared: a call of the package and of the plain version, and perhaps of the products of each alone."""

    ours: Callable[[], object]
    plain: Callable[[], object]
    bare_ours: Callable[[], object] | None = None
    bare_plain: Callable[[], object] | None = None
    gflop: float | None = None  # of ours, where the speed of products bounds it
    facts: dict | None = None  # what else to store: whether the sides agree, FLOPs
    warm: bool = False  # whether they have run before


def filled(model: nn.Module) -> nn.Module:
    """The model with small random numbers where it starts with zeros, so that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def sampler(size: str, dtype: torch.dtype = torch.float32) -> ARModel:
    """A random AR model for drawing."""
    torch.manual_seed(0)
    return filled(ARModel(ARConfig.preset(size))).to(dtype).eval().requires_grad_(False)


def tokenizer(size: str, batch: int, **changes) -> tuple[SequentialDiffusionTokenizer, Tensor]:
    """A random tokenizer, and images."""
    torch.manual_seed(0)
    model = filled(SequentialDiffusionTokenizer(replace(TokenizerConfig.preset(size), **changes)))
    return model, torch.rand(batch, 3, model.config.image_size, model.config.image_size) * 2 - 1


def quantizer(size: str, **form: bool) -> Sides:
    """Forward and backward pass of one image's tokens."""
    torch.manual_seed(0)
    count = 512 if size == "tiny" else 16384
    module, latents = VectorQuantizer(count, 8), torch.randn(1, 256, 8, requires_grad=True)
    with torch.no_grad():
        module.codebook.copy_(F.normalize(torch.randn(count, 8), dim=-1))

    def ours() -> Tensor:
        quantized, indices, losses = module(latents)
        (quantized.sum() + sum(loss.mean() for loss in losses.values())).backward()
        return indices

    def theirs() -> Tensor:
        values, loss, indices = plain.quantize(latents, module.codebook, **form)
        (values.sum() + loss).backward()
        return indices

    z, codes = F.normalize(latents.detach(), dim=-1)[0], module.codebook.detach()
    tiles = codes.split(BLOCK * CPU_TILE[1])
    bare = lambda: [z @ tile.T for tile in tiles], lambda: z @ codes.T
    return Sides(ours, theirs, *bare, facts={"indices_identical": bool((ours() == theirs()).all())})


def token_products(ar: ARModel, batch: int, count: int) -> Callable[[], object]:
    """The matrix products of `count` tokens without guidance, but for those of attention."""
    layers = [module for module in ar.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.ones(batch, 1, layer.weight.shape[1], dtype=ar.norm.weight.dtype) for layer in layers]
    return lambda: [layer(x) for _ in range(count) for layer, x in zip(layers, inputs, strict=True)]


def bfloat16_weights(size: str) -> Sides:
    """64 tokens (tiny: 8) of one image."""
    models, labels = (sampler(size, torch.bfloat16), sampler(size)), torch.zeros(1, dtype=torch.long)
    count, total = 8 if size == "tiny" else 64, models[0].config.num_tokens
    works = [partial(generate, ar, labels, top_k=1, num_tokens=count) for ar in models]
    padded = F.pad(works[1](), (0, total - count))
    rounded, exact = (ar(labels, padded)[:, :count].float() for ar in models)
    facts = {"relative_error_of_logits": error(rounded, exact)}
    facts["likeliest_token_agrees"] = round((rounded.argmax(-1) == exact.argmax(-1)).float().mean().item(), 3)
    return Sides(*works, *(token_products(ar, 1, count) for ar in models), facts=facts)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the norm."""
    return float(f"{(found - exact).norm() / exact.norm():.2g}")


def previews(size: str) -> Sides:
    """All K previews against the last one alone."""
    model, _ = tokenizer(size, 1)
    codes, noise = torch.randint(model.config.codebook_size, (1, model.config.num_tokens)), model.draw_noise(1)
    ours, plain = (partial(method, codes, noise) for method in (model.previews, model.detokenize))
    facts = {"last_identical": bool(torch.equal(ours()[:, -1], plain()))}
    return Sides(ours, plain, gflop=counting.decode(model.config) / 1e9, facts=facts)


def diffusion_step(size: str, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Sides:
    """One call of the pixel decoder on one image, against the float32, uncompiled one."""
    model, x = tokenizer(size, 1, repa_layer=None)
    exact = model.decoder.requires_grad_(False)
    other = copy.deepcopy(exact).to(dtype)
    if compiled:
        compile_blocks(other)
    t, cond = torch.full((1,), 0.5), torch.randn(1, model.config.window, model.config.conditioner_dim)
    works = partial(other, x.to(dtype), t, cond.to(dtype)), partial(exact, x, t, cond)
    gflop = counting.diffusion_step(model.config) / 1e9 if dtype == torch.float32 else None
    return Sides(*works, gflop=gflop, facts={"relative_error": error(works[0]().float(), works[1]())})


looked_up, compiled_step = partial(quantizer, one_hot=False), partial(diffusion_step, compiled=True)
with_entropy, half_step = partial(looked_up, entropy=True), partial(diffusion_step, dtype=torch.bfloat16)
# row: what is compared, what builds its sides of a size, the size, and the ratio to reach: plain over ours.
COMPARISONS = {
    "quantizer": ("quantizer, 16384x8, forward and backward: one-hot distance matrix", quantizer, "v1", 10.0),
    "quantizer_lookup": ("the same: distance matrix, codes looked up", looked_up, "v1", 10.0),
    "quantizer_entropy": ("the same: with an entropy loss of weight zero", with_entropy, "v1", None),
    "bfloat16": ("generation, L, batch 1, bfloat16 weights: float32", bfloat16_weights, "L", 2.0),
    "previews": ("all previews, light: one decode (theirs is the unit)", previews, "light", 1.1),
    "compile": ("diffusion step, v1, compiled: not compiled", compiled_step, "v1", 1.1),
    "step_bfloat16": ("diffusion step, v1, in bfloat16: float32", half_step, "v1", None),
}
INVERSE = ("previews",)  # the ratio is ours over plain, and the goal is not to be exceeded


def limits(clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """What bare products and reads reach on this CPU: the medians of a second or so each.

    Returns:
        "float32_gflops" and "bfloat16_gflops" of a product as large as an MLP of v1's decoder; "read_gb_per_s" of
        matrix-vector products over one gigabyte of float32 weights, more than any cache holds.
    """
    x, weight = torch.randn(1024, 768), torch.randn(3072, 768)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    large, vector = torch.randn(2**28 // 1024, 1024), torch.randn(1024)
    amount = 2 * 1024 * 768 * 3072 / 1e9
    works = {
        "float32_gflops": (lambda: F.linear(x, weight), amount),
        "bfloat16_gflops": (lambda: F.linear(half, half_weight), amount),
        "read_gb_per_s": (lambda: large @ vector, large.nbytes / 1e9),
    }
    return {
        name: round(amount / statistics.median(in_turns({name: work}, budget=1.0, clock=clock)[name]), 1)
        for name, (work, amount) in works.items()
    }


def run(
    argv: list[str],
    comparisons: Mapping[str, tuple] = COMPARISONS,
    threads: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    name: str = "clock",
) -> None:
    """Measure all that --only names; rows of other names stay in the file."""
    defaults = {"threads": threads, "budget": 45.0, "only": [*comparisons], "tiny": False}
    given = options(__doc__, argv, **defaults, output=RESULTS / f"{name}.json")
    torch.set_num_threads(given.threads)
    most = limits(clock)
    bounds = given.tiny, given.budget, most["float32_gflops"], clock
    rows = (compare(row, comparisons[row], *bounds) for row in given.only)
    what = "ratios: plain over ours, medians of interleaved pairs"
    timed = "CPU seconds" if clock is time.process_time else "the clock"
    record(given.output, what, rows, key="row", timed_by=timed, limits=most)


def compare(name: str, comparison: tuple, tiny: bool, budget: float, limit: float, clock: Callable[[], float]) -> dict:
    """One row: pairs for `budget` seconds, but at least LEAST_PAIRS and at most MOST_PAIRS."""
    what, build, size, goal = comparison
    row = {"row": name, "what": what}
    if "compile" in name and shutil.which("g++") is None:
        return row | {"skipped": "torch.compile on a CPU needs g++"}
    torch.manual_seed(0)
    sides, inverse = build("tiny" if tiny else size), name in INVERSE
    works = {side: work for side, work in zip(Sides._fields[:4], sides[:4], strict=True) if work}
    seconds = in_turns(works, budget=budget, least=LEAST_PAIRS, most=MOST_PAIRS, warm=sides.warm, clock=clock)
    row |= {"goal": goal, "at_most": inverse}
    row["ratio"] = ratio(seconds, *(("ours", "plain") if inverse else ("plain", "ours")))
    if sides.bare_ours:
        row["bare_ratio"] = ratio(seconds, "bare_plain", "bare_ours")
        row["products_share"] = ratio(seconds, "bare_ours", "ours")
        row["ratio_if_ours_were_products_alone"] = ratio(seconds, "plain", "bare_ours")
    row["pairs"] = len(seconds["ours"])
    row["milliseconds"] = {side: round(1000 * statistics.median(taken), 3) for side, taken in seconds.items()}
    if sides.gflop:
        speed = sides.gflop / statistics.median(seconds["ours"])
        row |= {"gflops": round(speed, 1), "share_of_limit": round(speed / limit, 3)}
        if sides.bare_ours:
            row["gflops_of_products_alone"] = round(sides.gflop / statistics.median(seconds["bare_ours"]), 1)
    return row | (sides.facts or {})


def table(result: dict) -> str:
    """Markdown of a stored result."""
    heads = ("ours: the plain version", "ratio", "goal", "ours, ms", "plain, ms")
    heads += ("products alone, ms and ratio", "of the product limit", "else")
    cells = [heads, ("---",) * len(heads)]
    for row in result["rows"]:
        if "skipped" in row:
            cells.append((row["what"], row["skipped"], *[""] * 6))
            continue
        ms = {name: f"{value:,.1f}" for name, value in row["milliseconds"].items()}
        goal = "" if row["goal"] is None else f"{'at most' if row['at_most'] else 'at least'} {row['goal']:g}"
        bare = f"{ms['bare_ours']}, {ms['bare_plain']}: {row['bare_ratio']}" if "bare_ratio" in row else ""
        share = f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""
        facts = ", ".join(f"{key.replace('_', ' ')}: {json.dumps(row[key])}" for key in row if key not in ROW_KEYS)
        cells.append((row["what"], f"{row['ratio']:.2f}", goal, ms["ours"], ms["plain"], bare, share, facts))
    machine, most = result["machine"], result["limits"]
    lines = ["|" + "|".join(f" {cell} " if cell != "---" else cell for cell in row) + "|" for row in cells]
    end = f"{machine['processor']}, threads: {machine['threads']}, load before the start {machine['other_load']:.1f}; "
    end += f"torch {machine['torch']}, {machine['date']}, revision {machine['revision']}. Limits measured before: "
    end += f"{most['float32_gflops']:.0f} GFLOP/s in float32, {most['bfloat16_gflops']:.0f} in bfloat16, "
    return "\n".join([*lines, "", f"{end}{most['read_gb_per_s']:.1f} GB/s read."])


def inserted(page: str, text: str, name: str = "clock") -> str:
    """The page with the table between the markers of this name."""
    between = f"(<!-- {name}: [^\n]*\n).*?(<!-- /{name} -->)"
    return re.sub(between, lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL)
