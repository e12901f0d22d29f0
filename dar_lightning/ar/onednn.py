"""On a CPU, weights laid out for products of few rows: once a call, not at each of its tokens."""

import copy
import platform

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class PackedLinear(nn.Module):
    """A bias-free linear layer, its weight in the layout that oneDNN chooses for `rows` rows; others are right, too."""

    def __init__(self, weight: Tensor, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def packed(ar: nn.Module, rows: int) -> nn.Module:
    """A model to draw many tokens with, `rows` sequences at a time; it computes the same up to rounding.

    Torch's product of a few rows with a weight costs about twice what one row costs, most of it for bringing the weight
    into another layout, anew at each token. Here that is done once, for as much memory again as the linear layers'
    weights hold.

    Returns:
        A copy that shares all else with `ar`, to be used as long as the weights stay as they are; or `ar` itself where
        nothing is to be gained: on another device or an ARM, for one row, under autocast, for other layers than its
        own, or where oneDNN is not there or not for this dtype. Compiled blocks are not compiled in the copy.
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
