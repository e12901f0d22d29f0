"""oneDNN weight packing, for faster decoding on x86 CPUs."""

import copy
import platform
from functools import cache
from pathlib import Path

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
        not compiled; or `ar` itself where that gains nothing (`_least_rows`) or oneDNN cannot do it.
    """
    layers = [layer for layer in ar.modules() if isinstance(layer, nn.Linear)]
    if rows < _least_rows() or torch.is_autocast_enabled("cpu") or not all(map(_can_pack, layers)):
        return ar
    ar = copy.deepcopy(ar, {id(tensor): tensor for tensor in (*ar.parameters(), *ar.buffers())})
    for parent in list(ar.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, PackedLinear(layer.weight, rows))
    return ar


@cache
def _least_rows() -> int:
    """Fewest rows for which packed products are faster: on Intel, MKL reads weights at memory speed for up to three."""
    info = Path("/proc/cpuinfo")
    return 4 if info.is_file() and "GenuineIntel" in info.read_text() else 2


def _can_pack(layer: nn.Linear) -> bool:
    """Only what is computed as by nn.Linear itself, on an x86 CPU, in a dtype that oneDNN has here."""
    weight, onednn = layer.weight, torch.backends.mkldnn
    plain = type(layer) is nn.Linear and layer.bias is None and not isinstance(weight, DTensor)
    if not plain or weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not (onednn.is_available() and onednn.enabled):
        return False
    half = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return half or weight.dtype == torch.float32
