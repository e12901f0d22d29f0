"""How tokens are drawn: by calls of the model, or by the decode step as a CUDA graph, with Triton or without."""

import warnings
from functools import cache, partial
from typing import Literal

import torch
from torch import nn

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel, Block
from dar_lightning.errors import require
from dar_lightning.layers import can_capture

Road = Literal["eager", "graph", "graph, Triton"]

METHODS = "start", "step", "_sequence", "_run", "hidden"  # in whose place the step computes


def choose_road(ar: nn.Module, static: bool | None = None) -> Road:
    """How a model's tokens are drawn: one call of the model each, or replays of a step.

    Args:
        ar: the model.
        static: None takes the step on CUDA, for a model of this package's layers alone, whose weights are plain tensors
            and which has no hooks. True and False say it; on a CPU the step is not captured.

    Returns:
        "eager"; "graph", with torch's attention over buckets of positions; or "graph, Triton", compiled and with our
        kernel, where that runs.

    Raises:
        UserError: True, for a model that the step cannot read.
    """
    own, size = ar.backbone is not None, ar.config.tokens_per_pass
    backbone = f"only our Llama has the step, backbone is {ar.config.backbone!r}"
    require(not (own and static), f"static: {backbone}; leave it out")
    require(size == 1 or not static, f"static: this model predicts {size} tokens a pass, the step one; leave it out")
    plain = not own and can_capture(ar) and _has_our_layers(ar)
    require(plain or not static, "static: this model's layers are sharded, replaced or have hooks; leave it out")
    device = next(ar.parameters()).device
    if size > 1 or not plain or not (device.type == "cuda" if static is None else static):
        return "eager"
    return "graph, Triton" if device.type == "cuda" and _triton_runs(device) else "graph"


def _has_our_layers(ar: nn.Module) -> bool:
    """Whether the step computes what the model does: a subclass, or an exchanged part, may do something else."""
    if any(getattr(getattr(ar, name, None), "__func__", None) is not getattr(ARModel, name) for name in METHODS):
        return False
    if any(_parts(block) != _our_parts() for block in ar.blocks):
        return False
    tables = ar.token_embedding, ar.place_embedding, ar.own_place_embedding
    embedded = {type(table) for table in tables if table is not None} == {nn.Embedding}
    parts = [ar.norm, ar.head, *(part for block in ar.blocks for part in block.modules())]
    changed = any(getattr(part, "bias", None) is not None or "forward" in vars(part) for part in parts)
    epsilons = {part.eps for part in parts if isinstance(part, nn.RMSNorm)}
    ends = type(ar.norm) is nn.RMSNorm and type(ar.head) is nn.Linear and epsilons == {ar.config.norm_eps}
    return embedded and ends and not changed


def _parts(block: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in block.named_modules()}


@cache
def _our_parts() -> dict[str, type]:
    """Parts of a block of any size: `decode_step._layer` computes them, but for dropout."""
    with torch.device("meta"):
        return _parts(Block(ARConfig.preset("tiny")))


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether our kernel compiles and starts: for that Triton needs a C compiler and Python's headers. Tried once."""
    new = partial(torch.zeros, device=device)
    position, seen = new(1, dtype=torch.long), new(1, 2, dtype=torch.bool)
    try:
        from dar_lightning.ar.decode_attention import decode_attention

        with torch.cuda.device(device):  # where Triton starts what it has compiled
            decode_attention(new(1, 48), new(2, 1, 1, 2, 16), seen, new(1, 8, 2), position, 1, 1)
    except Exception as error:  # of an import, a compiler or a driver
        reason = (str(error).strip().splitlines() or [""])[0]
        said = f"Triton does not run here ({type(error).__name__}: {reason})"
        warnings.warn(f"{said}: tokens are drawn by torch's own kernels, which takes longer", stacklevel=2)
        return False
    return True
