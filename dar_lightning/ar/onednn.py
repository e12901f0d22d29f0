"""oneDNN weight packing, for faster decoding on x86 CPUs."""

import copy
import platform

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class PackedLinear(nn.Module):
    """A bias-free linear layer whose weight has the layout that oneDNN prefers for `rows` rows; it takes any number."""

    def __init__(self, weight: Tensor, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def packed(ar: nn.Module, rows: int) -> nn.Module:
    """A copy of a model with packed linear layers, to decode `rows` sequences at a time; the same up to rounding.

    Torch reorders a weight anew for each product of a few rows, about half of its cost. Here that is done once, for as
    much memory again as the linear layers' weights hold.

    Returns:
        A copy that shares all else with `ar` and lasts as long as its weights stay as they are, with blocks that are
        not compiled; or `ar` itself for one row, on another device or CPU, under autocast, for other linear layers or
        dtypes, and without oneDNN.
    """
    layers = [layer for layer in ar.modules() if isinstance(layer, nn.Linear)]
    if rows == 1 or torch.is_autocast_enabled("cpu") or not all(map(_can_pack, layers)):
        return ar
    ar = copy.deepcopy(ar, {id(tensor): tensor for tensor in (*ar.parameters(), *ar.buffers())})
    for parent in list(ar.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, PackedLinear(layer.weight, rows))
    return ar


def _can_pack(layer: nn.Linear) -> bool:
    weight, onednn = layer.weight, torch.backends.mkldnn
    if type(layer) is not nn.Linear or layer.bias is not None:  # a subclass may compute something else
        return False
    if weight.device.type != "cpu" or isinstance(weight, DTensor) or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not (onednn.is_available() and onednn.enabled):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
