"""Slices of a model: each device keeps its part of every parameter (FSDP2), and here they become whole again."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def shard(model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Replace a model's parameters by slices of rank 0's, in place; a block's are gathered while it computes.

    Args:
        model: with a list `blocks`; its device is the mesh's.
        mesh: of one dimension, all devices.
        policy: dtypes of a block's gathered parameters and of its summed gradients. What is outside of the blocks
            stays as it is: the sum of embeddings starts the residual stream, which autocast keeps in float32.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, src=0)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # By default what is outside of the blocks stays gathered until the backward pass. In validation there is none, and
    # whoever looks at the parameters then (EMAWeightAveraging, checkpoints) must find slices.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may have a slice. All ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank; it may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_model(model: nn.Module) -> nn.Module:
    """What computes without the other ranks: the model itself, or of a sharded one a copy with whole parameters.

    All ranks call this together.

    Args:
        model: with a `config` that its class is built from.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()}, assign=True)
    for name in model.tables():
        setattr(copy, name, getattr(model, name))
    return copy.train(model.training)


def sliced(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole optimizer's state dict, its tensors sliced as this optimizer's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]

    def like(value: Any, parameter: DTensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value  # such as the number of steps
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    slices = {
        number: {name: like(value, parameter) for name, value in state["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in state["state"]
    }
    return {"state": slices, "param_groups": state["param_groups"]}
