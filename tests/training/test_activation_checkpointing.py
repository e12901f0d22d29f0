"""Activation checkpointing: the same bits, less memory, one more forward pass of that part, each of them counted."""

import pytest
import torch
from tiny_models import SIZE, random_codes
from tiny_training import ar_module, tokenizer_module
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

DEEP = {"encoder_depth": 2, "conditioner_depth": 2, "decoder_depth": 2}
PARTS = ["encoder", "conditioner", "decoder"]
IMAGES = {"image": torch.randint(256, (3, 3, SIZE, SIZE), generator=torch.manual_seed(0), dtype=torch.uint8)}
TOKENS = {"codes": torch.from_numpy(random_codes(3)), "label": torch.tensor([0, 1, 3])}


def step(module, batch: dict) -> tuple[dict, int, int]:
    """Gradients, bytes that wait for the backward pass, and FLOPs of a training step, its dropout included."""
    waiting: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            waiting[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(7)
    with FlopCounterMode(display=False) as flops:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = module.train().training_step(batch, 0)
        output["loss"].backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return gradients, sum(waiting.values()), flops.get_total_flops()


def forward_flops(forward, parts: list[str]) -> int:
    """FLOPs of these parts' blocks in a forward pass. The decoder's are called from outside of its own forward."""
    with FlopCounterMode(display=False) as flops:
        forward()
    counts = {name: sum(found.values()) for name, found in flops.get_flop_counts().items()}
    names = {"diffusionblock" if part == "decoder" else f"{part}.blocks.{i}" for part in parts for i in range(2)}
    return sum(found for name, found in counts.items() if name.lower() in names)


@pytest.mark.parametrize("parts", [*([part] for part in PARTS), PARTS, ["armodel"]], ids=str)
def test_a_step(parts):
    if parts == ["armodel"]:
        batch, plain, module = TOKENS, ar_module(), ar_module(activation_checkpointing=True)
        extra = forward_flops(lambda: ar_module().train().ar(TOKENS["label"], TOKENS["codes"]), parts)
    else:
        batch, plain, module = IMAGES, tokenizer_module(DEEP), tokenizer_module(DEEP, activation_checkpointing=parts)
        extra = forward_flops(lambda: tokenizer_module(DEEP).tokenizer.training_losses(IMAGES["image"].float()), parts)
    (expected, plain_bytes, plain_flops), (found, found_bytes, flops) = step(plain, batch), step(module, batch)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert flops - plain_flops == extra > 0
    assert found_bytes < (0.9 if len(parts) == 1 and parts != ["armodel"] else 0.5) * plain_bytes
