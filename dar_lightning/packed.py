"""On a CPU, weights laid out for the products that read them: once a call, not at each of its tokens or steps."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Module = TypeVar("Module", bound=nn.Module)


class PackedLinear(nn.Module):
    """A linear layer, its weight in the layout that oneDNN chooses for inputs of `rows` rows; others are right, too."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(module: Module, rows: int) -> Module:
    """A module for many passes with the same weights; it computes the same up to rounding.

    Torch's product of a few rows with a weight costs two or three times what one row costs, most of it for bringing the
    weight into another layout, anew each time. Here that is done once, for as much memory again as the linear layers'
    weights hold.

    Args:
        module: any, without gradients: a model, a decoder.
        rows: how many rows most products have: sequences, or images times patches.

    Returns:
        A copy that shares all else with `module`, to be used as long as its weights stay as they are; or `module`
        itself where nothing is to be gained: on another device, for one row, under autocast, or where oneDNN is not
        there or not for this dtype.
    """
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if rows == 1 or torch.is_autocast_enabled("cpu") or not all(_can_pack(linear.weight) for linear in linears):
        return module
    module = copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, PackedLinear(layer, rows))
    return module


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or isinstance(weight, DTensor) or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
