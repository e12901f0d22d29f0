"""torch.compile, block by block."""

import os
import shutil

import torch
from torch import nn

from dar_lightning.errors import UserError


def compile_blocks(*parts: nn.Module, mode: str | None = None) -> None:
    """Compile the transformer blocks of models, in place; parameters keep their names.

    All blocks of a part share their code, so compiling takes the time of one, and everything around them (masks,
    patches, losses) stays as it is.

    Args:
        *parts: modules with a list `blocks`.
        mode: torch.compile's; "reduce-overhead" uses CUDA graphs.
    """
    for part in parts:
        for block in part.blocks:
            block.compile(mode=mode)


def check_compiler(device: torch.device) -> None:
    """Torch needs a C++ compiler for code on a CPU, and says so only when the code runs.

    Raises:
        UserError: there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"compile: on a CPU this needs a C++ compiler, and there is no {compiler}: leave it out")
