"""Every number that the official AR model gave, to 1e-4 of the tensor's largest magnitude; tokens exactly."""

import pytest
import torch
import torch.nn.functional as F

from dar_lightning.ar.guidance import guidance_schedule, guide
from dar_lightning.ar.sampling import generate
from dar_lightning.weights.official_names import AR_NAMES, official_name

TOLERANCE = 1e-4


def assert_close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    assert ours.shape == golden.shape
    error = (ours.detach() - golden).abs().max() / golden.abs().max()
    assert error < TOLERANCE, f"off by {error:.1e} of the largest magnitude"


def cached_logits(ar, labels, tokens) -> torch.Tensor:
    """Logits (B, N, V) of every token from the KV cache, one position at a time."""
    with torch.no_grad():
        first, cache = ar.start(labels, tokens[:, :0])
        logits = [first] + [ar.step(tokens[:, i], cache) for i in range(tokens.shape[1] - 1)]
    return torch.stack(logits, dim=1)


def test_training_logits_and_loss(golden):
    labels, tokens = golden.inputs["labels"].long(), golden.inputs["tokens"].long()
    logits = golden.ar(labels, tokens)
    assert_close(logits, golden.outputs["train_logits_nodrop"])
    assert_close(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), golden.outputs["train_loss_nodrop"].squeeze())


def test_training_with_a_dropped_class(golden):
    labels, tokens = golden.inputs["labels"].long(), golden.inputs["tokens"].long()
    labels = torch.where(golden.inputs["class_drop_u"] < 0.1, golden.ar.null_class, labels)
    logits = golden.ar(labels, tokens)
    assert_close(logits, golden.outputs["train_logits_classdrop"])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert_close(loss, golden.outputs["train_loss_classdrop"].squeeze())


def test_loss_without_the_last_sample(golden):
    labels, tokens = golden.inputs["labels"].long(), golden.inputs["tokens"].long()
    logits = golden.ar(labels[:-1], tokens[:-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:-1].flatten())
    assert_close(loss, golden.outputs["train_loss_valid_mask_last_sample_excluded"].squeeze())


def test_gradient_norm_of_every_parameter(golden):
    labels, tokens = golden.inputs["labels"].long(), golden.inputs["tokens"].long()
    golden.ar.zero_grad()
    F.cross_entropy(golden.ar(labels, tokens).flatten(0, 1), tokens.flatten()).backward()
    expected = dict(golden.grad_norms["loss_nodrop"])
    for name, parameter in golden.ar.named_parameters():
        norm = expected.pop(official_name(name, AR_NAMES))
        assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=TOLERANCE), name
    assert not expected


def test_cached_logits(golden):
    """Also of grouped-query attention, whose cached form the official code cannot run: there, cached == uncached."""
    labels, tokens = golden.inputs["labels"].long(), golden.inputs["tokens"].long()
    expected = golden.outputs.get("eval_cached_logits", golden.outputs["train_logits_nodrop"])
    assert_close(cached_logits(golden.ar, labels, tokens), expected)


def test_generation_under_every_guidance(golden):
    labels = golden.inputs["labels"].long()
    for i, setting in enumerate(golden.config["generate"]):
        scale = setting["cfg_scale"]
        guidance = tuple(map(float, scale.split(","))) if isinstance(scale, str) else scale
        scales = guidance_schedule(guidance, golden.ar.config.num_tokens)
        assert_close(torch.tensor(scales), golden.outputs[f"gen{i}_cfg_schedule"])

        tokens = golden.outputs[f"gen{i}_tokens"].long()
        assert torch.equal(generate(golden.ar, labels, guidance=guidance, top_k=1), tokens)

        both = torch.cat([labels, torch.full_like(labels, golden.ar.null_class)])
        stacked = cached_logits(golden.ar, both, tokens.repeat(2, 1))
        guided = [guide(stacked[:, n], s) for n, s in enumerate(scales)]
        assert_close(torch.stack(guided, dim=1), golden.outputs[f"gen{i}_logits"])
