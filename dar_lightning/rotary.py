"""Rotary positions (RoPE): turning pairs of channels by an angle."""

import torch
from torch import Tensor


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the interleaved pairs (x[2i], x[2i+1]) of x (..., L, head_dim) by rotary (L, head_dim / 2, 2).

    A pair is a complex number, and turning it one multiplication: on a CPU in float32 this is many times as fast as
    even and odd channels apart. The compiler knows no complex numbers, but fuses the latter into one loop.

    Args:
        x: queries or keys.
        rotary: cosine and sine of each pair's angle.

    Returns:
        Like x. Below float32 precision, computed in float32 and rounded once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rotary = rotary.to(wide.dtype)
    if torch.compiler.is_compiling():
        (cos, sin), (even, odd) = rotary.unbind(-1), wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.view_as_complex(rotary))
    return turned.flatten(-2).to(x.dtype)
