"""Transformer parts of both models: rotary positions (RoPE), KV cache, activation checkpointing, torch.compile."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dar_lightning.errors import UserError


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

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, n, head_dim) after `length`; return views of all (B, heads, m, head_dim)."""
        end = self.length + keys.shape[2]
        k, v = self.buffer[layer]
        k[:, :, self.length : end] = keys
        v[:, :, self.length : end] = values
        return k[:, :, :end], v[:, :, :end]


def run_block(block: nn.Module, *inputs, recompute: bool):
    """Call a transformer block.

    Args:
        block: the block, compiled or not.
        *inputs: its arguments.
        recompute: between forward and backward, keep these inputs alone. The gradients have the same bits, dropout
            included; the block's forward pass is computed twice.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def compile_blocks(*parts: nn.Module) -> None:
    """Compile the transformer blocks of models, in place; parameters keep their names.

    All blocks of a part share their code, so compiling takes the time of one, and everything around them (masks,
    patches, losses) stays as it is.

    Args:
        *parts: modules with a list `blocks`.
    """
    for part in parts:
        for block in part.blocks:
            block.compile()


def compile_graphs(*parts: nn.Module) -> None:
    """Compile each model as one CUDA graph, in place, to be called without gradients; parameters keep their names.

    A CUDA graph's outputs are its own memory, which the next graph overwrites: blocks compiled one by one would take
    each other's. So a whole model is one graph, and what it puts out is copied.

    Args:
        *parts: modules that return a tensor.
    """
    for part in parts:
        part.compile(mode="reduce-overhead")
        part._compiled_call_impl = _copying(part._compiled_call_impl)


def _copying(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs, **options: function(*inputs, **options).clone()


def check_compiler(device: torch.device) -> None:
    """Torch needs a C++ compiler for code on a CPU, and says so only when the code runs.

    Raises:
        UserError: there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"compile: on a CPU this needs a C++ compiler, and there is no {compiler}: leave it out")
