"""Fully sharded data parallel (FSDP2) as a Trainer strategy, with checkpoints that any other strategy reads."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from dar_lightning.errors import require


def mixed_precision() -> MixedPrecisionPolicy:
    """How a block computes in bf16-mixed: its matrices in bfloat16, and what autocast leaves in float32 in float32.

    Under autocast alone, bfloat16 copies of the matrices would outlive their gathering, until the backward pass.
    """
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if not hasattr(policy, "param_dtype_override_fn"):
        return policy
    return replace(policy, param_dtype_override_fn=lambda parameter: parameter.dtype if parameter.ndim == 1 else None)


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
    # whoever looks at the parameters then (EMA, checkpoints) must find slices.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may have a slice. All ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_slice(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank; it may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_model(model: nn.Module) -> nn.Module:
    """A model with a `config`, or if it is sharded a copy with whole parameters. All ranks call this together."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    with torch.device("meta"):
        copy = type(model)(model.config)
    copy.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()}, assign=True)
    for name in model.tables():
        setattr(copy, name, getattr(model, name))
    return copy.train(model.training)


class FSDP2Strategy(DDPStrategy):
    """Each device keeps a slice of every parameter, gradient, optimizer state and average of an AR model.

    Parameters are gathered block by block where the forward and the backward pass need them. What a step computes is
    what DDP computes. A checkpoint is one file with whole tensors, as of DDP or of a single device, so each of them
    resumes from it and `dar export` reads it. Validation alone (`dar validate`) runs on the whole model.

    Lightning's own FSDPStrategy (FSDP1) runs on GPUs only, its ModelParallelStrategy reads checkpoints past
    SafeCheckpointIO, and neither keeps the average of the weights.

    With `precision: bf16-mixed`, the blocks' matrices are gathered as bfloat16; embeddings, norms and head as float32,
    so that the residual stream is float32 as under DDP (before torch 2.15, the blocks' norms are rounded); gradients
    are summed as float32.

    Args:
        timeout: how long a device waits for the others before it fails.
        process_group_backend: nccl or gloo; null takes what suits the device.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), process_group_backend: str | None = None):
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)

    def configure_ddp(self) -> None:
        """Shard the model and its average; the optimizer, made after this, works on the slices."""
        module, trainer = self.lightning_module, self.lightning_module.trainer
        said = "trainer.strategy: FSDP2Strategy shards"
        require(hasattr(module, "ar"), f"{said} AR models, this is a {type(module).__name__}: use ddp")
        own = module.ar.config.backbone
        require(module.ar.backbone is None, f"{said} our Llama, backbone is {own!r}: use ddp")
        known = trainer.precision in ("32-true", "bf16-mixed")
        require(known, f"trainer.precision: {trainer.precision} with FSDP2Strategy; use bf16-mixed or 32-true")
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        policy = mixed_precision() if trainer.precision == "bf16-mixed" else MixedPrecisionPolicy()
        shard(module.ar, mesh, policy)
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAveraging):
                shard(callback._average_model.module.ar.to(self.root_device), mesh, policy)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Gather slices on rank 0, tensor by tensor, and write them as one file. All ranks call this together."""

        def gather(tensor: DTensor) -> Tensor | None:
            full = whole(tensor)
            return full.cpu() if self.is_global_zero else None

        super().save_checkpoint(tree_map_only(DTensor, gather, checkpoint), filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's slices of a whole optimizer's state."""

        def like(parameter: DTensor, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                return value  # such as the number of steps
            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            slices = {
                number: {name: like(parameters[number], value) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": slices})

    def teardown(self) -> None:
        """Lightning would move the slices to the CPU, where their mesh is not."""
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator, self.checkpoint_io):
            part.teardown()
