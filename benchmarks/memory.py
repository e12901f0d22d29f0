"""What a training step needs, counted without a GPU: weights and their states, activations, FLOPs.

`python benchmarks/memory.py` prints a table. Activations are what autograd keeps between forward and backward pass in
bf16-mixed, counted on tensors without data that claim to lie on a GPU, at two batch sizes, for what does not grow with
the batch. Not counted: LPIPS and DINOv2, temporary buffers, fragmentation, the CUDA context; so it is a lower bound.
"""

import json
import warnings
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dar_lightning.training import ARModule, TokenizerModule

PARTS = ["encoder", "conditioner", "decoder"]
MODELS: dict[str, Callable[[], LightningModule]] = {
    "light": partial(TokenizerModule, preset="light"),
    "v1": partial(TokenizerModule, preset="v1"),
    "v1, decoder checkpointed": partial(TokenizerModule, preset="v1", activation_checkpointing=["decoder"]),
    "v1, all checkpointed": partial(TokenizerModule, preset="v1", activation_checkpointing=PARTS),
    **{f"AR {size}": partial(ARModule, preset=size) for size in ("B", "L", "XL", "XXL")},
    "AR XXL, checkpointed": partial(ARModule, preset="XXL", activation_checkpointing=True),
}


def forward(module: LightningModule, batch_size: int) -> tuple[int, int]:
    """Bytes that a forward pass in bf16-mixed keeps for the backward pass, and its FLOPs."""
    device = next(module.parameters()).device.type
    if isinstance(module, TokenizerModule):
        side = module.tokenizer.config.image_size
        batch = {"image": torch.zeros(batch_size, 3, side, side, dtype=torch.uint8)}
    else:
        codes = torch.zeros(batch_size, module.ar.config.num_tokens, dtype=torch.int64)
        batch = {"codes": codes, "label": codes[:, 0].clone()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    # Not torch.autocast, which is off for a GPU that is not there.
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    try:
        with FlopCounterMode(display=False) as flops, saved_tensors_hooks(keep, lambda tensor: tensor):
            module.training_step(batch, 0)
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()
    return sum(storage.nbytes() for storage in kept.values()), flops.get_total_flops()


def count(make: Callable[[], LightningModule], device: str = "cuda") -> dict[str, float]:
    """Parameters, bytes per sample and in any case, forward GFLOP per sample."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        module = make()
        (two, _), (four, flops) = forward(module, 2), forward(module, 4)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "activation_bytes_per_sample": (four - two) / 2,
        "activation_bytes_fixed": 2 * two - four,
        "forward_gflop_per_sample": flops / 4 / 1e9,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, make in MODELS.items():
        print(json.dumps({"model": name} | {key: round(value, 1) for key, value in count(make).items()}), flush=True)
