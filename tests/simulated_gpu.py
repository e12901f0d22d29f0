"""A device that is not the CPU, and a process group that serves it alone, as NCCL does, on a machine without a GPU.

Importing this changes the process for good: do it in a process of its own.
"""

import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, ddp
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class Backend(_DummyBackendModule):
    """What torch looks for in torch.cuda, for autocast."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("sim", Backend())
DEVICE = torch.device("sim", 0)


class Waits:
    """Where a real device would make the host wait: (time of the wait, time when what it waits for was made, place)."""

    def __init__(self):
        self.clock, self.found = lambda: -1, []  # the clock gives a training step

    def note(self, born: int) -> None:
        frames = [Path(frame.filename) for frame in traceback.extract_stack()]
        callers = [frame for frame in frames if {"dar_lightning", "lightning"} & {*frame.parts}]
        self.found.append((self.clock(), born, callers[-1].name))


WAITS = Waits()
READING = ("_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select", "is_nonzero", "equal")


class OnDevice(torch.Tensor):
    """A tensor of that device. Its values are `raw`, a tensor of the CPU, on which everything is computed."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor):
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=DEVICE, **layout)
        tensor.raw, tensor.born = raw, WAITS.clock()
        return tensor

    def __repr__(self) -> str:
        return f"OnDevice({self.raw})"

    def tolist(self) -> list:
        WAITS.note(self.born)
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device") or DEVICE

        def lower(leaf):
            return torch.device("cpu") if isinstance(leaf, torch.device) else raw_of(leaf)

        def lift(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            same = [tensor for tensor in given if raw_of(tensor) is leaf]  # computed in place
            return same[0] if same else OnDevice(leaf) if target.type == "sim" else leaf

        name = function.overloadpacket.__name__
        reads = name in READING or (name == "_to_copy" and target.type == "cpu")
        # A copy between host and device, either way, that is not said to be without a wait.
        crosses = name == "copy_" and len({isinstance(tensor, OnDevice) for tensor in args[:2]}) == 2
        if reads or (crosses and not (kwargs.get("non_blocking") or args[2:])):
            WAITS.note(max(tensor.born for tensor in given if isinstance(tensor, OnDevice)))
        args, kwargs = tree_map(lower, (args, kwargs))
        return tree_map(lift, function(*args, **kwargs))


def raw_of(leaf):
    return leaf.raw if isinstance(leaf, OnDevice) else leaf


def _copy(source, target, non_blocking=False):
    raw_of(target).copy_(raw_of(source))
    return target


def _make(name: str, function) -> None:
    """What is called with a device, but without a tensor of it."""
    _kernels.impl(name, lambda *args, dtype=None, **_: OnDevice(function(*args, dtype=dtype)), "PrivateUse1")


_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("_copy_from", _copy, "PrivateUse1")
_make("empty.memory_format", torch.empty)
_make("empty_strided", torch.empty_strided)
for name in ("arange", "arange.start", "arange.start_step"):
    _make(name, torch.arange)


class TwoEqualRanks(dist.ProcessGroup):
    """Rank 0 of two, of which the other has the same tensors. It refuses those of the CPU with NCCL's words."""

    _device_types: tuple[torch.device, ...] = ()  # torch has no recorder for a group written in Python

    def getBackendName(self) -> str:
        return "likenccl"

    @staticmethod
    def _check(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if tensor.device.type != "sim":
                raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")

    def allreduce(self, tensors, options) -> None:
        self._check(*tensors)
        if options.reduceOp == dist.ReduceOp.SUM:
            for tensor in tensors:
                tensor.mul_(2)

    def allgather(self, outputs, inputs, options) -> None:
        for places, tensor in zip(outputs, inputs, strict=True):
            self._check(tensor, *places)
            for place in places:
                place.copy_(tensor)

    def all_gather_single(self, output, tensor, options) -> None:
        self._check(output, tensor)
        output.view(2, -1).copy_(tensor.flatten())

    def broadcast(self, tensors, options) -> None:
        self._check(*tensors)

    def barrier(self, opts) -> None:
        self._check(torch.empty(0, device=opts.device))


class Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """CPUAccelerator would refuse it."""


ddp._sync_module_states = lambda module: None  # it is written in C++, which finds no memory in these tensors


class Strategy(DDPStrategy):
    """Everything of DDP but the exchange of weights and gradients, which are the same on both ranks."""

    def configure_ddp(self) -> None:
        """There is nothing to wrap the module in."""


def make_trainer(**options) -> Trainer:
    """A Trainer of that device and group."""
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK")
    os.environ |= dict.fromkeys(names, "0") | {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "simulated"}
    if not dist.is_initialized():
        dist.Backend.register_backend(
            "likenccl", lambda store, rank, size, timeout: TwoEqualRanks(rank, size), devices=["sim"]
        )
        dist.init_process_group("likenccl", rank=0, world_size=2, store=dist.HashStore())
        TwoEqualRanks._device_types = (DEVICE,)
    strategy = Strategy(Accelerator(), [DEVICE], TorchElasticEnvironment(), process_group_backend="likenccl")
    return Trainer(strategy=strategy, devices=1, num_nodes=2, **options)
