"""DistributedDataParallel whose gradient buckets are the same from the first step on: exact resume with many ranks.

DDP sums gradients in buckets, which it divides anew after its first backward pass, in the order in which they came.
Three or more ranks add up in an order that depends on the place in a bucket: the first step of a resumed run would be
rounded in another way than the same step of the unbroken one. Two ranks cannot be: a + b is b + a.
"""

from contextlib import nullcontext
from functools import partial

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class FixedBuckets(DistributedDataParallel):
    """DDP that divides its buckets once, before the first step, as if gradients came in the reverse order of the model.

    That is nearly the order in which they do come, so summing still overlaps with the backward pass.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]


def fix_buckets(strategy: Strategy) -> None:
    """Let Lightning's DDPStrategy wrap its model in FixedBuckets; other strategies stay as they are."""
    if isinstance(strategy, DDPStrategy) and type(strategy)._setup_model is DDPStrategy._setup_model:
        strategy._setup_model = partial(_wrap, strategy)


def _wrap(strategy: DDPStrategy, model: nn.Module) -> FixedBuckets:
    devices = strategy.determine_ddp_device_ids()
    # as Lightning does: not on the stream that computes
    with nullcontext() if devices is None else torch.cuda.stream(torch.cuda.Stream()):
        return FixedBuckets(module=model, device_ids=devices, **strategy._ddp_kwargs)
