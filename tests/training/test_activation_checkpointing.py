"""Activation checkpointing: the same bits, less memory, one more forward pass of that part, each of them counted."""

import pytest
import torch
from runs import ar_module, tokenizer_module
from tiny_models import SIZE, random_codes
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

DEEP = {"encoder_depth": 2, "conditioner_depth": 2, "decoder_depth": 2}
PARTS = ("encoder", "conditioner", "decoder")


IMAGES = {"image": torch.randint(256, (3, 3, SIZE, SIZE), generator=torch.manual_seed(0), dtype=torch.uint8)}
TOKENS = {"codes": torch.from_numpy(random_codes(3)), "label": torch.tensor([0, 1, 3])}


def step(module, batch: dict) -> tuple[dict, int, FlopCounterMode]:
    """Gradients, bytes that wait for the backward pass, and FLOPs of a training step."""
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
    return gradients, sum(waiting.values()), flops


def forward_flops(flops: FlopCounterMode, part: str) -> int:
    """FLOPs of a part's blocks in a forward pass. The decoder's are called from outside of its own forward."""
    counts = {name: sum(found.values()) for name, found in flops.get_flop_counts().items()}
    if part == "decoder":
        return counts["DiffusionBlock"]
    return sum(found for name, found in counts.items() if name.lower().rpartition(".")[0] == f"{part}.blocks")


@pytest.mark.parametrize("parts", [*([part] for part in PARTS), list(PARTS)], ids=str)
def test_tokenizer(parts):
    plain, plain_bytes, plain_flops = step(tokenizer_module(DEEP), IMAGES)
    found, found_bytes, flops = step(tokenizer_module(DEEP, activation_checkpointing=parts), IMAGES)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    with FlopCounterMode(display=False) as forward:
        tokenizer_module(DEEP).tokenizer.training_losses(IMAGES["image"].float())
    extra = sum(forward_flops(forward, part) for part in parts)
    assert extra > 0
    assert flops.get_total_flops() - plain_flops.get_total_flops() == extra
    assert found_bytes < (0.5 if len(parts) == 3 else 0.9) * plain_bytes


def test_ar_with_dropout():
    plain, plain_bytes, plain_flops = step(ar_module(), TOKENS)
    found, found_bytes, flops = step(ar_module(activation_checkpointing=True), TOKENS)
    other, *_ = step(ar_module(), TOKENS | {"label": torch.tensor([2, 2, 2])})
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    assert not torch.equal(other["ar.blocks.0.ffn.up.weight"], plain["ar.blocks.0.ffn.up.weight"])
    with FlopCounterMode(display=False) as forward:
        ar_module().train().ar(TOKENS["label"], TOKENS["codes"])
    assert flops.get_total_flops() - plain_flops.get_total_flops() == forward_flops(forward, "armodel") > 0
    assert found_bytes < 0.5 * plain_bytes
