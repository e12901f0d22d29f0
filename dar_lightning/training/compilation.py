"""torch.compile of models that train: each transformer block as one graph."""

import torch
from torch import nn

from dar_lightning.layers import compile_blocks

VARIANTS = 64  # of a block's code, by shapes, grad mode and cache; a run needs about ten


def compile_for_training(*parts: nn.Module) -> None:
    """Compile the blocks of modules with a list `blocks`, in place, and let no setting of torch cut or drop a graph.

    Two settings of the process are changed. DDP's optimizer would cut a block where a bucket of gradients is full, for
    the overlap that separate blocks have anyway (`optimize_ddp`). And the blocks of encoder and conditioner share code
    of which training, validation, small batches and streaming need variants: after 8, torch compiles no more.
    """
    settings = torch._dynamo.config
    settings.optimize_ddp = False
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(settings, limit, max(getattr(settings, limit), VARIANTS))
    compile_blocks(*parts)
