"""torch.compile: block by block, or a whole model as one CUDA graph."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dar_lightning.errors import UserError


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
