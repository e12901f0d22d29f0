"""Rotary positions (RoPE): turning pairs of channels by an angle."""

import torch
from torch import Tensor


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the interleaved pairs (x[2i], x[2i+1]) of x (..., L, head_dim) by rotary (L, head_dim / 2, 2).

    In float32 for any x of fewer bits: bfloat16 angles would be off by up to 0.002. A pair is a complex number, and
    turning it one multiplication: faster on a CPU, and fewer kernels on a GPU, than even and odd channels apart. Those
    are for the compiler, which knows no complex numbers and fuses them anyway, and for Apple's mps.

    Args:
        x: queries or keys.
        rotary: cosine and sine of each pair's angle.

    Returns:
        Like x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs, rotary = x.to(wide).unflatten(-1, (-1, 2)), rotary.to(wide)
    if torch.compiler.is_compiling() or x.device.type == "mps":
        (cos, sin), (even, odd) = rotary.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).to(x.dtype)
