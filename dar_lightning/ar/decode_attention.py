"""Attention of one new token per sequence as one Triton kernel: rotate, append to the cache, attend to all before it.

Importing this needs Triton; `ar.decode_step` does so only where it is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # positions of the cache per pass


@triton.jit
def _attend(
    qkv,
    cache,
    seen,
    rotary,
    position,
    out,
    scale,
    value_offset,
    row_stride,
    head_stride,
    seen_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,  # HEAD_DIM / 2, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """A program is one row and one key/value head, with all the query heads that read it."""
    row, kv = tl.program_id(0), tl.program_id(1)
    row = row.to(tl.int64)  # a large cache has offsets beyond 32 bits
    at = tl.load(position)
    group: tl.constexpr = HEADS // KV_HEADS
    pair, channel = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    half, whole = pair < HEAD_DIM // 2, channel < HEAD_DIM
    cos = tl.load(rotary + 2 * pair, mask=half, other=0.0)
    sin = tl.load(rotary + 2 * pair + 1, mask=half, other=0.0)
    dtype = cache.dtype.element_ty

    given = qkv + row * (HEADS + 2 * KV_HEADS) * HEAD_DIM
    source = given + (HEADS + kv) * HEAD_DIM + 2 * pair
    even = tl.load(source, mask=half, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=half, other=0.0).to(tl.float32)
    # rounded as they are stored: a token reads itself as later ones will read it
    key = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(2 * PAIRS).to(dtype)
    value = tl.load(given + (HEADS + KV_HEADS + kv) * HEAD_DIM + channel, mask=whole, other=0.0).to(dtype)
    keys = cache + row * row_stride + kv * head_stride
    values = keys + value_offset
    tl.store(keys + at * HEAD_DIM + channel, key, mask=whole)
    tl.store(values + at * HEAD_DIM + channel, value, mask=whole)
    key, value = key.to(tl.float32), value.to(tl.float32)

    for i in tl.static_range(group):
        head = kv * group + i
        source = given + head * HEAD_DIM + 2 * pair
        even = tl.load(source, mask=half, other=0.0).to(tl.float32)
        odd = tl.load(source + 1, mask=half, other=0.0).to(tl.float32)
        query = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(2 * PAIRS)
        query = query.to(dtype).to(tl.float32) * scale
        # softmax as it goes, begun with the new token, which is not read back
        largest, total, sums = tl.sum(query * key, 0), 1.0, value
        for start in range(0, at, BLOCK):
            places = start + tl.arange(0, BLOCK)
            known = places < at
            known = known & tl.load(seen + row * seen_stride + places, mask=known, other=0).to(tl.int1)
            offsets = places[:, None] * HEAD_DIM + channel[None]
            read = known[:, None] & whole[None]
            scores = tl.sum(tl.load(keys + offsets, mask=read, other=0.0).to(tl.float32) * query[None], 1)
            scores = tl.where(known, scores, -float("inf"))
            new = tl.maximum(largest, tl.max(scores, 0))
            shrink, weights = tl.exp(largest - new), tl.exp(scores - new)
            held = tl.load(values + offsets, mask=read, other=0.0).to(tl.float32)
            sums = sums * shrink + tl.sum(weights[:, None] * held, 0)
            total = total * shrink + tl.sum(weights, 0)
            largest = new
        target = out + row * HEADS * HEAD_DIM + head * HEAD_DIM + channel
        tl.store(target, (sums / total).to(out.dtype.element_ty), mask=whole)


@torch.library.custom_op("dar_lightning::decode_attention", mutates_args=("cache",))
def decode_attention(
    qkv: Tensor, cache: Tensor, seen: Tensor, rotary: Tensor, position: Tensor, heads: int, kv_heads: int
) -> Tensor:
    """Attention of the token at `position`, which is read on the device; its key and value go into the cache.

    One operation to torch.compile, so that no part of the cache is copied.

    Args:
        qkv: (B, (heads + 2 kv_heads) * head_dim), contiguous.
        cache: (2, B, kv_heads, capacity, head_dim) keys and values, of which those before `position` are read.
        seen: (B, capacity) bool, those of them that may be.
        rotary: (1, head_dim / 2, 2) float32 cosine and sine at `position`.
        position: (1,) int64, below the capacity.
        heads: query heads.
        kv_heads: key/value heads.

    Returns:
        (B, heads * head_dim) in qkv's dtype.
    """
    batch, head_dim = len(qkv), cache.shape[-1]
    out = qkv.new_empty(batch, heads * head_dim)
    pairs = triton.next_power_of_2(head_dim // 2)
    strides, sizes = (*cache.stride()[:3], seen.stride(0)), (heads, kv_heads, head_dim, pairs, BLOCK)
    _attend[(batch, kv_heads)](qkv, cache, seen, rotary, position, out, head_dim**-0.5, *strides, *sizes)
    return out


@decode_attention.register_fake
def _(qkv, cache, seen, rotary, position, heads, kv_heads):
    return qkv.new_empty(len(qkv), heads * cache.shape[-1])
