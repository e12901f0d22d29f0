"""The official way of computing: what D-AR's released code does for a call, written anew, on the weights of our models.

Not the repository's files. Kept is what takes time: separate projections, RoPE by real products, attention maps that
nobody reads, REPA's head in sampling, blocks that are computed again in training, the whole distance matrix and its
entropy loss, a cache of full length under a mask with attention as products, sampling by softmax and multinomial.

`python -m benchmarks official` times both in CPU seconds of one thread, which other work on the machine disturbs
little, and the products of both alone, whose time nothing else can undercut.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks import clock, counting, plain
from dar_lightning import ARConfig, ARModel, SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.ar import sampling
from dar_lightning.layers import compile_blocks
from dar_lightning.tokenizer.blocks import Attention, GatedBlock, axial_rotary, plain_norm
from dar_lightning.tokenizer.conditioner import Conditioner
from dar_lightning.tokenizer.decoder import DiffusionBlock, PixelDecoder, time_embedding
from dar_lightning.tokenizer.flow import shift_time

# ---- tokenizer


def table(height: int, width: int, others: int = 0) -> Tensor:
    """A rotation matrix for each place and pair of channels: (height * width + others, 32, 2, 2)."""
    cos, sin = axial_rotary(height, width, 64, others).unbind(-1)
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))


def turn(x: Tensor, angles: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (angles[..., 0] * pairs[..., 0] + angles[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


def attend(
    part: Attention,
    x: Tensor,
    context: Tensor,
    turns: tuple[Tensor | None, Tensor | None] = (None, None),
    mask: Tensor | None = None,
    causal: bool = False,
    maps: bool = False,
) -> Tensor:
    """Of queries from x; `maps` builds the attention map, too."""
    q, k, v = (
        layer(given).reshape(len(x), -1, x.shape[-1] // part.head_dim, part.head_dim).permute(0, 2, 1, 3)
        for layer, given in ((part.q, x), (part.k, context), (part.v, context))
    )
    q, k = part.q_norm(q), part.k_norm(k)
    q, k = (each if angles is None else turn(each, angles) for each, angles in zip((q, k), turns, strict=True))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    if maps:
        scores = q * part.head_dim**-0.5 @ k.transpose(-2, -1)
        hidden = (torch.tril(torch.ones_like(scores)) if causal else mask).logical_not().float()
        scores += torch.where(hidden == 1.0, float("-inf"), hidden)
        scores.softmax(-1)
    return part.out(found.transpose(1, 2).reshape(x.shape))


def called(function: Callable[..., Tensor], *inputs: Tensor, again: bool) -> Tensor:
    return checkpoint(function, *inputs, use_reentrant=False) if again else function(*inputs)


def gated(block: GatedBlock, x: Tensor, **options) -> Tensor:
    again = block.training
    h = called(lambda h: attend(block.attention, h, h, maps=not again, **options), block.norm1(x), again=again)
    x = x + h * block.gate1.reshape(1, 1, -1)
    return x + called(block.mlp, block.norm2(x), again=again) * block.gate2.reshape(1, 1, -1)


def diffuse(block: DiffusionBlock, x: Tensor, cond: Tensor, t: Tensor, angles: Tensor) -> Tensor:
    time = block.time_mlp(time_embedding(t, x.shape[-1]))[:, None]
    signal = attend(block.cross_attention, plain_norm(x), plain_norm(block.cond_mlp(cond)), (angles, None))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(F.silu(time + signal)).chunk(6, dim=-1)
    h = plain_norm(x) * (1 + scale_a) + shift_a
    x = x + gate_a * called(lambda h: attend(block.attention, h, h, (angles, angles)), h, again=block.training)
    return x + gate_m * called(block.mlp, plain_norm(x) * (1 + scale_m) + shift_m, again=block.training)


def velocity(decoder: PixelDecoder, x: Tensor, t: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
    """And what REPA's head makes of the hidden state."""
    cond, patch = plain_norm(decoder.cond_proj(cond)), decoder.config.decoder_patch_size
    x = decoder.conv_in(rearrange(x, "b c (h p1) (w p2) -> b (c p1 p2) h w", p1=patch, p2=patch))
    height, width = x.shape[-2:]
    angles, x = table(height, width), rearrange(x, "b c h w -> b (h w) c")
    for i, block in enumerate(decoder.blocks):
        if i == decoder.config.repa_layer:
            side = max(height // 16, 1)
            hidden = F.avg_pool2d(rearrange(x, "b (h w) c -> b c h w", h=height), side, side)
            projected = decoder.repa_head(rearrange(hidden, "b c h w -> b (h w) c"))
        x = diffuse(block, x, cond, t, angles)
    x = decoder.conv_out(rearrange(plain_norm(x), "b (h w) c -> b c h w", h=height))
    return rearrange(x, "b (c p1 p2) h w -> b c (h p1) (w p2)", p1=patch, p2=patch), projected


def latents(tokenizer: SequentialDiffusionTokenizer, images: Tensor) -> Tensor:
    encoder, count = tokenizer.encoder, tokenizer.config.num_tokens
    patches = encoder.patchify(images)
    height, width = patches.shape[-2:]
    queries = encoder.query_proj(encoder.queries.weight[:count].repeat(len(images), 1, 1))
    x = torch.cat([plain_norm(rearrange(patches, "b c h w -> b (h w) c")), queries], dim=1)
    mask = torch.tril(torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool))
    mask[..., : height * width] = True
    angles = table(height, width, count)
    for block in encoder.blocks:
        x = gated(block, x, turns=(angles, angles), mask=mask)
    return encoder.to_latent(plain_norm(x[:, -count:]))


def condition(conditioner: Conditioner, values: Tensor) -> Tensor:
    x = conditioner.from_latent(values) + conditioner.positions.weight[: values.shape[1]].repeat(len(values), 1, 1)
    for block in conditioner.blocks:
        x = gated(block, x, causal=True)
    return plain_norm(x)


@torch.no_grad()
def encode(tokenizer: SequentialDiffusionTokenizer, images: Tensor) -> Tensor:
    return plain.quantize(latents(tokenizer, images), tokenizer.quantizer.codebook, one_hot=False)[2]


def tokenizer_loss(tokenizer: SequentialDiffusionTokenizer, images: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """Flow and codebook losses, and the mean of REPA's head."""
    config = tokenizer.config
    values, quantizer_loss, _ = plain.quantize(
        latents(tokenizer, images), tokenizer.quantizer.codebook, one_hot=False, entropy=True
    )
    cond = condition(tokenizer.conditioner, values)[torch.arange(len(u))[:, None], tokenizer.schedule.windows(u)]
    t, x1 = shift_time(u, config.time_shift), config.data_std * images
    share = t[:, None, None, None]
    v, projected = velocity(tokenizer.decoder, share * x1 + (1.0 - share) * noise, t, cond)
    return F.mse_loss(v, x1 - noise) / config.data_std**2 + quantizer_loss + projected.mean()


# ---- AR model


def norm(part: nn.RMSNorm, x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + part.eps)).type_as(x) * part.weight


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, L, heads, D)."""
    pairs, (cos, sin) = x.float().reshape(*x.shape[:-1], -1, 2), angles[None, :, None].unbind(-1)
    turned = [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin]
    return torch.stack(turned, dim=-1).flatten(3).type_as(x)


def logits(ar: ARModel, x: Tensor, place: Tensor | None = None, cache: Tensor | None = None, mask=None) -> Tensor:
    """Of embeddings (B, L, D); a cache is (layers, 2, B, heads, length, head_dim), of which `place` is written."""
    batch, length, dim = x.shape
    angles = ar.rotary[:length] if place is None else ar.rotary[place]
    for layer, block in enumerate(ar.blocks):
        part, ffn = block.attention, block.ffn
        split = part.qkv(norm(block.attention_norm, x)).split([dim, dim, dim], dim=-1)
        q, k, v = (each.view(batch, length, part.heads, part.head_dim) for each in split)
        q, k, v = (each.transpose(1, 2) for each in (turn_pairs(q, angles), turn_pairs(k, angles), v))
        if cache is not None:
            cache[layer, 0][:, :, place], cache[layer, 1][:, :, place] = k, v
            k, v = cache[layer]
        k, v = k.repeat_interleave(1, dim=1), v.repeat_interleave(1, dim=1)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + block.residual_dropout(part.out(found.transpose(1, 2).contiguous().view(batch, length, dim)))
        h = norm(block.ffn_norm, x)
        x = x + block.ffn_dropout(ffn.down(F.silu(ffn.gate(h)) * ffn.up(h)))
    return ar.head(norm(ar.norm, x)).float()


def ar_loss(ar: ARModel, labels: Tensor, codes: Tensor) -> Tensor:
    """Of a training step: classes are dropped as ours are."""
    dropped = torch.rand(len(labels)) < ar.config.class_dropout
    prefix = ar.class_embedding(torch.where(dropped, ar.null_class, labels)).values
    x = ar.token_dropout(torch.cat([prefix, ar.token_embedding(codes[:, :-1])], dim=1))
    return F.cross_entropy(logits(ar, x).contiguous().view(-1, ar.config.vocab_size), codes.view(-1))


@torch.no_grad()
def generate(ar: ARModel, labels: Tensor, scale: float = 1.0, count: int | None = None, greedy: bool = False) -> Tensor:
    """Tokens (B, count) of a model with a KV head a head, guided where the scale is above 1."""
    config, batch, guided = ar.config, len(labels), scale > 1.0
    rows, count = batch * (1 + guided), count or config.num_tokens
    room = -(-(1 + config.num_tokens) // 8) * 8
    cache = torch.zeros(config.depth, 2, rows, config.num_heads, room, config.dim // config.num_heads)
    causal = torch.tril(torch.ones(room, room, dtype=torch.bool)).repeat(rows, 1, 1)
    x = ar.class_embedding(torch.cat([labels, torch.full_like(labels, ar.null_class)]) if guided else labels).values
    place, tokens = torch.tensor([0]), []
    for _ in range(count):
        with sdpa_kernel(SDPBackend.MATH):
            found = logits(ar, x, place, cache, causal[:, None, place])
        if guided:
            with_class, without = found.split(batch)
            found = without + (with_class - without) * scale
        shares = F.softmax(found[:, -1], dim=-1)
        tokens.append(shares.argmax(-1, keepdim=True) if greedy else torch.multinomial(shares, num_samples=1))
        x = ar.token_embedding(torch.cat([tokens[-1]] * 2) if guided else tokens[-1])
        place = place + 1
    return torch.cat(tokens, dim=1)


# ---- rows of benchmarks.clock

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_linear_pointwise"}
PRODUCTS |= {f"_scaled_dot_product_flash_attention_for_cpu{way}" for way in ("", "_backward")}


class Products(TorchDispatchMode):
    """Keeps the matrix products of a work, fused attention among them, with their operands; `run` computes them."""

    def __init__(self, work: Callable[[], object]):
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        with self:
            work()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in PRODUCTS:
            self.calls.append(partial(function, *args, **kwargs or {}))
        return function(*args, **kwargs or {})

    @torch.no_grad()
    def run(self) -> None:
        for call in self.calls:
            call()


def sides(works: Sequence[Callable[[], object]], flops: float) -> clock.Sides:
    return clock.Sides(*works, *(Products(work).run for work in works), gflop=flops / 1e9, warm=True)


def training(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], flops: float, compiled: bool = False
) -> clock.Sides:
    """Of steps: both passes, clipping, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    steps = [partial(step, loss) for loss in losses]
    return compiled_sides(steps, model, flops) if compiled else sides(steps, flops)


def compiled_sides(works: Sequence[Callable[[], object]], part: nn.Module, flops: float) -> clock.Sides:
    """Ours with a part's blocks compiled, as by `compile: true` and `--compile`; the official way calls no block."""
    compile_blocks(part)
    return clock.Sides(*works, gflop=flops / 1e9)


def of_tokenizer(row: str, size: str) -> clock.Sides:
    layer = TokenizerConfig.preset(size).repa_layer
    model, images = clock.tokenizer(size, 1, repa_layer=1 if layer is None else layer)
    config, noise, decoder = model.config, torch.ones_like(images), model.decoder
    if row == "training":
        losses = [partial(f, model, images, torch.ones(1), noise) for f in (counting.tokenizer_loss, tokenizer_loss)]
        return training(model, losses, counting.tokenizer_step(config))
    model.requires_grad_(False).eval()
    if row == "encode":
        return sides([partial(model.tokenize, images), partial(encode, model, images)], counting.encode(config))
    given = noise, torch.full((1,), 0.5), torch.randn(1, config.window, config.conditioner_dim)
    steps = [partial(f, *given) for f in (decoder, partial(velocity, decoder))]
    flops = counting.diffusion_step(config)
    return compiled_sides(steps, decoder, flops) if row == "decode_compiled" else sides(steps, flops)


def of_ar(row: str, size: str, images: int = 1) -> clock.Sides:
    model, labels, config = clock.sampler(size), torch.zeros(images, dtype=torch.long), ARConfig.preset(size)
    if "training" in row:
        codes = torch.randint(config.vocab_size, (2, config.num_tokens))
        model.train().requires_grad_()
        ours = lambda: F.cross_entropy(model(labels.repeat(2), codes).flatten(0, 1), codes.flatten())  # noqa: E731
        losses = ours, partial(ar_loss, model, labels.repeat(2), codes)
        flops = 2 * (counting.ar_step(config) - counting.causal_half(config))
        return training(model, losses, flops, compiled=row == "training_compiled")
    scale, count = 3.0 if row == "guided" else 1.0, config.num_tokens // 2
    ours = partial(sampling.generate, model, labels, guidance=scale, num_tokens=count)
    works = ours, partial(generate, model, labels, scale, count)
    if row == "dispatch":  # in the place of ours: its products, and all its operations, on vectors of 8 numbers a head
        small = clock.filled(ARModel(replace(config, dim=8 * config.num_heads))).eval()
        products, rest = Products(ours), partial(sampling.generate, small, labels, guidance=scale, num_tokens=count)
        return clock.Sides(lambda: (products.run(), rest()), works[1])
    return sides(works, images * counting.ar_tokens(config, count, scale > 1))


ROWS = {  # as clock.COMPARISONS: the official way over ours
    "encode": ("encoding, v1", partial(of_tokenizer, "encode"), "v1", None),
    "decode": ("decoding, v1: a diffusion step of 8", partial(of_tokenizer, "decode"), "v1", 1.15),
    "decode_compiled": ("the same, our blocks compiled", partial(of_tokenizer, "decode_compiled"), "v1", 1.15),
    "tokenizer_training": ("training step, light, 1 image", partial(of_tokenizer, "training"), "light", None),
    "generate": ("128 tokens, B, 1 image", partial(of_ar, "generate"), "B", 1.3),
    "dispatch": ("the same, our operations on 96 numbers", partial(of_ar, "dispatch"), "B", None),
    "generate_8": ("128 tokens, B, 8 images", partial(of_ar, "generate", images=8), "B", None),
    "guided": ("128 tokens, B, 1 image, guided", partial(of_ar, "guided"), "B", None),
    "ar_training": ("training step, B, 2 sequences", partial(of_ar, "training"), "B", 1.1),
    "ar_training_compiled": ("the same, our blocks compiled", partial(of_ar, "training_compiled"), "B", 1.1),
}
