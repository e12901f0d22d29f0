"""Every number that the official AR model gave, to 1e-4 of the tensor's largest magnitude; tokens exactly."""

import pytest
import torch
import torch.nn.functional as F
from official import TOLERANCE, assert_close

from dar_lightning.ar.guidance import guidance_schedule, guide, read_guidance
from dar_lightning.ar.sampling import generate
from dar_lightning.weights.official import AR_NAMES, official_name


@torch.no_grad()
def cached_logits(ar, labels, tokens) -> torch.Tensor:
    """Logits (B, N, V) of every token from the KV cache, one position at a time."""
    first, cache = ar.start(labels, tokens[:, :0])
    return torch.stack([first] + [ar.step(tokens[:, i], cache) for i in range(tokens.shape[1] - 1)], dim=1)


@pytest.fixture
def batch(golden) -> tuple[torch.Tensor, torch.Tensor]:
    return golden.inputs["labels"].long(), golden.inputs["tokens"].long()


def test_training_logits_losses_and_gradient_norms(golden, batch):
    """Of all samples, with a dropped class, and of all but the last sample."""
    (labels, tokens), model, outputs = batch, golden.model, golden.outputs
    kept = torch.where(golden.inputs["class_drop_u"] < 0.1, model.null_class, labels)
    for classes, drop in ((kept, "classdrop"), (labels, "nodrop")):
        logits = model(classes, tokens)
        assert_close(logits, outputs[f"train_logits_{drop}"])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        assert_close(loss, outputs[f"train_loss_{drop}"].squeeze())
    all_but_one = F.cross_entropy(model(labels[:-1], tokens[:-1]).flatten(0, 1), tokens[:-1].flatten())
    assert_close(all_but_one, outputs["train_loss_valid_mask_last_sample_excluded"].squeeze())
    model.zero_grad()
    loss.backward()
    expected = dict(golden.grad_norms["loss_nodrop"])
    for name, parameter in model.named_parameters():
        norm = expected.pop(official_name(name, AR_NAMES))
        assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=TOLERANCE), name
    assert not expected


def test_cached_logits(golden, batch):
    """Also of grouped-query attention, whose cached form the official code cannot run: there, cached == uncached."""
    expected = golden.outputs.get("eval_cached_logits", golden.outputs["train_logits_nodrop"])
    assert_close(cached_logits(golden.model, *batch), expected)


def test_generation_under_every_guidance(golden, batch):
    labels, _ = batch
    for i, setting in enumerate(golden.config["generate"]):
        guidance = read_guidance(setting["cfg_scale"])
        scales = guidance_schedule(guidance, golden.model.config.num_tokens)
        assert_close(torch.tensor(scales), golden.outputs[f"gen{i}_cfg_schedule"])

        tokens = golden.outputs[f"gen{i}_tokens"].long()
        assert torch.equal(generate(golden.model, labels, guidance=guidance, top_k=1), tokens)

        both = torch.cat([labels, torch.full_like(labels, golden.model.null_class)])
        stacked = cached_logits(golden.model, both, tokens.repeat(2, 1))
        guided = [guide(stacked[:, n], s) for n, s in enumerate(scales)]
        assert_close(torch.stack(guided, dim=1), golden.outputs[f"gen{i}_logits"])
