"""Gumbel noise of drawn tokens, a hash of a key per sequence and position; kept as E = exp(-G), which is exponential.

A row does not depend on its batch; hashed in integers, devices differ by rounding only; computed where the logits are,
no token waits for the host.
"""

from functools import partial

import torch
from torch import Tensor

from dar_lightning.layers import Generators, draw_per_sample

METHOD = "races of lowbias32"  # its name in stored protocols: with another method the same seeds draw other images


def draw_keys(count: int, num_tokens: int, generator: Generators, device: torch.device) -> Tensor:
    """A key of 64 bits per sequence and position: (count, num_tokens, 2) int32."""
    draw = partial(torch.randint, -(2**31), 2**31, dtype=torch.int32)
    return draw_per_sample(draw, (count, num_tokens, 2), generator, device)


def exponentials(keys: Tensor, num_codes: int) -> Tensor:
    """Independent unit exponentials, one per row and code: keys (B, 2) -> (B, num_codes) float32.

    Two rounds of the 32-bit hash `lowbias32` (C. Wellons), each with one half of the key.
    """
    codes = torch.arange(num_codes, device=keys.device, dtype=torch.int32)
    words = _mix_(_mix_(codes ^ keys[:, :1]) ^ keys[:, 1:])
    uniforms = _shifted(words, 1).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)  # float32 rounds some to 1
    return uniforms.neg_().log1p_().neg_()


def _mix_(words: Tensor) -> Tensor:
    words ^= _shifted(words, 16)
    words *= 0x7FEB352D
    words ^= _shifted(words, 15)
    words *= 0x846CA68B - 2**32  # the same in 32 bits with a sign
    words ^= _shifted(words, 16)
    return words


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (words >> bits).bitwise_and_(0xFFFFFFFF >> bits)
