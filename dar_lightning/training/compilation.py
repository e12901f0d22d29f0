"""torch.compile of models that train: each transformer block as one graph."""

import torch
from torch import nn

from dar_lightning.layers import compile_blocks, recompile_limit

VARIANTS = 64  # of a block's code, by shapes, grad mode and cache; a run needs about ten


def compile_for_training(*parts: nn.Module) -> None:
    """Compile the blocks of modules with a list `blocks`, in place, and let no setting of torch cut or drop a graph."""
    keep_graphs_whole()
    compile_blocks(*parts)


def keep_graphs_whole() -> None:
    """Change two settings of dynamo, which from torch 2.15 on belong to a thread: call this in the one that trains.

    DDP's optimizer would cut a block where a bucket of gradients is full, for the overlap that separate blocks have
    anyway (`optimize_ddp`). And the blocks of encoder and conditioner share code of which training, validation, small
    batches and streaming need variants: after 8, torch compiles no more.
    """
    settings, limit = torch._dynamo.config, recompile_limit()
    settings.optimize_ddp = False
    setattr(settings, limit, max(getattr(settings, limit), VARIANTS))
