"""Rotary positions (RoPE): turning pairs of channels by an angle."""

import torch
from torch import Tensor


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the interleaved pairs (x[2i], x[2i+1]) of x (..., L, head_dim) by rotary (L, head_dim / 2, 2).

    A pair is a complex number, and turning it one multiplication: on a CPU that is faster than even and odd channels
    apart, in bfloat16 too, though only float32 has complex numbers. Elsewhere, and for the compiler, which knows none,
    the channels are turned apart in x's own precision.

    Args:
        x: queries or keys.
        rotary: cosine and sine of each pair's angle.

    Returns:
        Like x.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.view_as_complex(rotary.to(wide.dtype)))
        return turned.flatten(-2).to(x.dtype)
    (cos, sin), (even, odd) = rotary.to(x.dtype).unbind(-1), x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
