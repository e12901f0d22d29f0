"""What both models share: RoPE, KV cache, activation checkpointing, torch.compile, random numbers per sample."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dar_lightning.errors import require

Generators = torch.Generator | list[torch.Generator] | None  # one for the batch, one per sample, or torch's global one


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Apply RoPE to queries or keys: interleaved pairs of x (..., L, head_dim), angles rotary (L, head_dim / 2, 2).

    In float32 for any x of fewer bits: bfloat16 angles would be off by up to 0.002. Complex multiplication is faster on
    a CPU, and fewer kernels on a GPU, than even and odd channels apart, which are for Apple's mps and for the compiler,
    which knows no complex numbers.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs, rotary = x.to(wide).unflatten(-1, (-1, 2)), rotary.to(wide)
    if torch.compiler.is_compiling() or x.device.type == "mps":
        (cos, sin), (even, odd) = rotary.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Key-value cache of all attention layers of a model, allocated once.

    Args:
        shape: (layers, batch, heads, capacity, head_dim); capacity is the length of the longest sequence.
        weight: of the model; the cache is on its device, in its dtype or, under autocast, in autocast's.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], weight: Tensor):
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.buffer = torch.empty(shape[0], 2, *shape[1:], device=weight.device, dtype=dtype)
        self.length = 0  # of the sequences so far; the model counts on when all layers have written
        self.real: Tensor | None = None  # (batch, P) bool: False for padding at the start, which nothing attends to

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, n, head_dim) after `length`; return views of all (B, heads, m, head_dim)."""
        end = self.length + keys.shape[2]
        k, v = self.buffer[layer]
        k[:, :, self.length : end] = keys
        v[:, :, self.length : end] = values
        return k[:, :, :end], v[:, :, :end]

    def keep(self, batch: int) -> None:
        """Go on with the first `batch` sequences alone; nothing is copied, and no memory given back."""
        self.buffer = self.buffer[:, :, :batch]
        self.real = None if self.real is None else self.real[:batch]


def run_block(block: nn.Module, *inputs, recompute: bool):
    """Call a transformer block; with `recompute`, by activation checkpointing: the same gradients, bit for bit."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def compile_blocks(*parts: nn.Module) -> None:
    """Compile each of the transformer blocks of modules with a list `blocks`, in place; parameters keep their names.

    All blocks of a module share their code, so compiling takes the time of one.
    """
    for part in parts:
        for block in part.blocks:
            block.compile()


def check_compiler(device: torch.device) -> None:
    """Raise a UserError if torch.compile has no C++ compiler for a CPU, which torch says only when the code runs."""
    compiler = os.environ.get("CXX", "g++")
    found = device.type != "cpu" or shutil.which(compiler)
    require(found, f"compile: on a CPU this needs a C++ compiler, and there is no {compiler}: leave it out")


def draw_per_sample(draw: Callable[..., Tensor], shape: tuple, generator: Generators, device: torch.device) -> Tensor:
    """Random numbers (samples, ...) on a device; with a list of generators a sample's do not depend on its batch.

    `draw`, torch.randn or its like, is called for the generator's device, so that a CPU generator draws the same for
    every device.

    Raises:
        UserError: for a list of another length.
    """
    if isinstance(generator, list):
        count = len(generator)
        require(count == shape[0], f"generator is a list of {count}: {shape[0]} samples need {shape[0]}")
        return torch.cat([draw_per_sample(draw, (1, *shape[1:]), one, device) for one in generator])
    return draw(shape, generator=generator, device=device if generator is None else generator.device).to(device)
