"""Ratios by the clock, on a CPU: the package against plain versions, in interleaved pairs of one process.

Each comparison runs its two sides in turn, the order changing from pair to pair, and its ratio is the median over
pairs: a busy machine slows both sides. Where matrix products or memory leave little to gain, `bare` runs the products
of both sides alone, in the same pairs: its ratio is what the machine allows.
"""

import argparse
import copy
import json
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import counting, plain
from benchmarks.machine import CPU, describe, in_turns, limits, ratio, store
from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.ar.onednn import PackedLinear, packed
from dar_lightning.ar.sampling import generate
from dar_lightning.layers import compile_blocks
from dar_lightning.tokenizer.quantizers.vector import BLOCK, VectorQuantizer
from dar_lightning.tokenizer.quantizers.vector import CPU_TILE as QUANTIZER_TILE

LEAST_PAIRS, MOST_PAIRS = 3, 31
ROW_KEYS = {"what", "goal", "at_most", "ratio", "bare_ratio", "pairs", "milliseconds", "gflops", "share_of_limit"}
MARKERS = "<!-- clock: python -m benchmarks table -->", "<!-- /clock -->"


class Sides(NamedTuple):
    """What is compared: a call of the package and of the plain version, and perhaps of the products of each alone."""

    ours: Callable[[], object]
    plain: Callable[[], object]
    bare_ours: Callable[[], object] | None = None
    bare_plain: Callable[[], object] | None = None
    gflop: float | None = None  # of ours, where the speed of products bounds it
    facts: dict | None = None  # what else to store: whether the sides agree, FLOPs


class Comparison(NamedTuple):
    """A row of the table: words, what builds its sides (tiny or not), and the ratio to reach.

    Where `inverse`, the ratio is ours over plain, and the goal is not to be exceeded.
    """

    what: str
    build: Callable[[bool], Sides]
    goal: float | None = None
    inverse: bool = False


def filled(model: nn.Module) -> nn.Module:
    """The model with small random numbers where it starts with zeros, so that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def sampler(config: ARConfig, dtype: torch.dtype = torch.float32) -> ARModel:
    """A random AR model for drawing."""
    torch.manual_seed(0)
    return filled(ARModel(config)).to(dtype).eval().requires_grad_(False)


def tokenizer(config: TokenizerConfig, batch: int) -> tuple[SequentialDiffusionTokenizer, Tensor]:
    """A random tokenizer, and images."""
    torch.manual_seed(0)
    model = filled(SequentialDiffusionTokenizer(config))
    return model, torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1


def quantizer(tiny: bool, **form: bool) -> Sides:
    """Forward and backward pass of one image's tokens."""
    torch.manual_seed(0)
    size = 512 if tiny else 16384
    module, latents = VectorQuantizer(size, 8), torch.randn(1, 256, 8, requires_grad=True)
    with torch.no_grad():
        module.codebook.copy_(F.normalize(torch.randn(size, 8), dim=-1))

    def ours() -> Tensor:
        quantized, indices, vq, commit = module(latents)
        (quantized.sum() + vq.mean() + commit.mean()).backward()
        return indices

    def theirs() -> Tensor:
        loss, indices = plain.quantize(latents, module.codebook, **form)
        loss.backward()
        return indices

    z, codes = F.normalize(latents.detach(), dim=-1)[0], module.codebook.detach()
    tiles = codes.split(BLOCK * QUANTIZER_TILE[1])
    bare = lambda: [z @ tile.T for tile in tiles], lambda: z @ codes.T
    return Sides(ours, theirs, *bare, facts={"indices_identical": bool((ours() == theirs()).all())})


def cached_generation(tiny: bool) -> Sides:
    """Tokens of 8 images."""
    ar, labels = sampler(ARConfig.preset("tiny" if tiny else "B")), torch.arange(8)
    sides = Sides(
        lambda: generate(ar, labels, generator=torch.Generator().manual_seed(0)),
        lambda: plain.generate(ar, labels, torch.Generator().manual_seed(0)),
        *(token_products(model, 8, ar.config.num_tokens) for model in (packed(ar, rows=8), ar)),
    )
    return sides._replace(facts={"tokens_equal": round((sides.ours() == sides.plain()).float().mean().item(), 4)})


def token_products(ar: ARModel, batch: int, count: int) -> Callable[[], object]:
    """The matrix products of `count` tokens without guidance, but for those of attention."""
    layers = [module for module in ar.modules() if isinstance(module, nn.Linear | PackedLinear)]
    inputs = [torch.ones(batch, 1, layer.weight.shape[1], dtype=ar.norm.weight.dtype) for layer in layers]
    return lambda: [layer(x) for _ in range(count) for layer, x in zip(layers, inputs, strict=True)]


def bfloat16_weights(tiny: bool) -> Sides:
    """64 tokens (tiny: 8) of one image."""
    config = ARConfig.preset("tiny" if tiny else "L")
    full, half = sampler(config), sampler(config, torch.bfloat16)
    labels, count = torch.zeros(1, dtype=torch.long), 8 if tiny else 64
    works = [lambda ar=ar: generate(ar, labels, top_k=1, num_tokens=count) for ar in (half, full)]
    padded = F.pad(works[1](), (0, config.num_tokens - count))
    rounded, exact = (ar(labels, padded)[:, :count].float() for ar in (half, full))
    facts = {
        "relative_error_of_logits": error(rounded, exact),
        "likeliest_token_agrees": round((rounded.argmax(-1) == exact.argmax(-1)).float().mean().item(), 3),
    }
    return Sides(*works, *(token_products(ar, 1, count) for ar in (half, full)), facts=facts)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, of the norm."""
    return float(f"{(found - exact).norm() / exact.norm():.2g}")


def training_step(tiny: bool) -> Sides:
    """Forward and backward pass of one image."""
    config = TokenizerConfig.preset("tiny" if tiny else "v1")
    model, images = tokenizer(config, 1)

    def step(recompute: bool) -> None:
        model.decoder.recompute = recompute
        losses = model.training_losses(images, torch.full((1,), 0.5), torch.ones_like(images))
        loss = losses["flow"] + losses["vq"] + losses["commit"]
        if recompute:
            entropy, _ = plain.quantize(losses["latents"], model.quantizer.codebook, one_hot=False, entropy=True)
            loss = loss + 0 * entropy
        loss.backward()

    once, twice = counting.tokenizer_step(config), counting.tokenizer_step(config, recompute=("decoder",))
    facts = {"ratio_of_flops": round(twice / once, 3)}
    return Sides(lambda: step(False), lambda: step(True), gflop=once / 1e9, facts=facts)


def encoding(tiny: bool) -> Sides:
    """Tokens of 2 images."""
    config = TokenizerConfig.preset("tiny" if tiny else "v1")
    model, images = tokenizer(config, 2)

    def theirs() -> Tensor:
        with plain.attention_maps():
            return model.tokenize(images)

    facts = {"codes_identical": bool((model.tokenize(images) == theirs()).all())}
    return Sides(lambda: model.tokenize(images), theirs, gflop=2 * counting.encode(config) / 1e9, facts=facts)


def previews(tiny: bool) -> Sides:
    """All K previews against the last one alone."""
    config = TokenizerConfig.preset("tiny" if tiny else "light")
    model, _ = tokenizer(config, 1)
    codes, noise = torch.randint(config.codebook_size, (1, config.num_tokens)), model.draw_noise(1)
    sides = Sides(lambda: model.previews(codes, noise), lambda: model.detokenize(codes, noise))
    same = bool(torch.equal(sides.ours()[:, -1], sides.plain()))
    return sides._replace(gflop=counting.decode(config) / 1e9, facts={"last_identical": same})


def diffusion_step(tiny: bool, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Sides:
    """One call of the pixel decoder on one image, against the float32, uncompiled one."""
    config = TokenizerConfig.preset("tiny" if tiny else "v1")
    model, x = tokenizer(replace(config, repa_layer=None), 1)
    exact = model.decoder.requires_grad_(False)
    other = copy.deepcopy(exact).to(dtype)
    if compiled:
        compile_blocks(other)
    t, cond = torch.full((1,), 0.5), torch.randn(1, config.window, config.conditioner_dim)
    sides = Sides(lambda: other(x.to(dtype), t, cond.to(dtype)), lambda: exact(x, t, cond))
    gflop = counting.diffusion_step(config) / 1e9 if dtype == torch.float32 else None
    return sides._replace(gflop=gflop, facts={"relative_error": error(sides.ours().float(), sides.plain())})


COMPARISONS = {
    "quantizer": Comparison("quantizer, 16384x8, forward and backward: one-hot distance matrix", quantizer, 10.0),
    "quantizer_lookup": Comparison(
        "the same: distance matrix, codes looked up", lambda tiny: quantizer(tiny, one_hot=False), 10.0
    ),
    "quantizer_entropy": Comparison(
        "the same: with an entropy loss of weight zero", lambda tiny: quantizer(tiny, one_hot=False, entropy=True)
    ),
    "generation": Comparison("generation, B, batch 8: masked attention to a static cache", cached_generation, 1.3),
    "bfloat16": Comparison("generation, L, batch 1, bfloat16 weights: float32", bfloat16_weights, 2.0),
    "training": Comparison("training step, v1: decoder recomputed, entropy loss", training_step),
    "encoding": Comparison("encoding, v1: attention maps built too", encoding, 1.08),
    "previews": Comparison("all previews, light: one decode (theirs is the unit)", previews, 1.1, inverse=True),
    "compile": Comparison(
        "diffusion step, v1, compiled: not compiled", lambda tiny: diffusion_step(tiny, compiled=True), 1.1
    ),
    "step_bfloat16": Comparison(
        "diffusion step, v1, in bfloat16: float32", lambda tiny: diffusion_step(tiny, torch.bfloat16)
    ),
}
NEED_COMPILER = ("compile",)


def run(arguments: argparse.Namespace) -> dict:
    """Measure all that `arguments.only` names; print and store each as it is done."""
    torch.set_num_threads(arguments.threads)
    result = {"what": "ratios: plain over ours, medians of interleaved pairs", "machine": describe(CPU)}
    result["limits"] = {name: round(value, 1) for name, value in limits(CPU).items()}
    result["rows"] = {}
    for name in arguments.only:
        if name in NEED_COMPILER and shutil.which("g++") is None:
            result["rows"][name] = {"what": COMPARISONS[name].what, "skipped": "torch.compile on a CPU needs g++"}
        else:
            result["rows"][name] = compare(COMPARISONS[name], arguments.tiny, arguments.budget, result["limits"])
        print(json.dumps({name: result["rows"][name]}), flush=True)
        store(arguments.output, result)
    return result


def compare(comparison: Comparison, tiny: bool, budget: float, machine: dict[str, float]) -> dict:
    """One row: pairs for `budget` seconds, but at least LEAST_PAIRS and at most MOST_PAIRS."""
    sides = comparison.build(tiny)
    works = {name: work for name, work in zip(Sides._fields[:4], sides[:4], strict=True) if work}
    seconds = in_turns(works, budget=budget, least=LEAST_PAIRS, most=MOST_PAIRS)
    row = {"what": comparison.what, "goal": comparison.goal, "at_most": comparison.inverse}
    row["ratio"] = ratio(seconds, *(("ours", "plain") if comparison.inverse else ("plain", "ours")))
    if sides.bare_ours:
        row["bare_ratio"] = ratio(seconds, "bare_plain", "bare_ours")
    row["pairs"] = len(seconds["ours"])
    row["milliseconds"] = {name: round(1000 * statistics.median(taken), 3) for name, taken in seconds.items()}
    if sides.gflop:
        speed = sides.gflop / statistics.median(seconds["ours"])
        row |= {"gflops": round(speed, 1), "share_of_limit": round(speed / machine["float32_gflops"], 3)}
    return row | (sides.facts or {})


def table(result: dict) -> str:
    """Markdown of a stored result."""
    heads = ("ours: the plain version", "ratio", "goal", "ours, ms", "plain, ms")
    heads += ("products alone, ms and ratio", "of the product limit", "else")
    cells = [heads, ("---",) * len(heads)]
    for row in result["rows"].values():
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
    lines += ["", f"{machine['processor']}, threads: {machine['threads']}, load before the start "]
    lines[-1] += f"{machine['other_load']:.1f}; torch {machine['torch']}, {machine['date']}, revision "
    lines[-1] += f"{machine['revision']}. Limits measured before: {most['float32_gflops']:.0f} GFLOP/s in float32, "
    lines[-1] += f"{most['bfloat16_gflops']:.0f} in bfloat16, {most['read_gb_per_s']:.1f} GB/s read."
    return "\n".join(lines)


def inserted(page: str, text: str) -> str:
    """The page with the table between its markers."""
    start, end = map(re.escape, MARKERS)
    return re.sub(f"({start}\n).*?({end})", lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL)
