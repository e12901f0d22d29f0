"""Activation checkpointing: keep what goes into a block, and compute its inside again when gradients need it."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
