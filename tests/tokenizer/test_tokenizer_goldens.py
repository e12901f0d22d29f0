"""Every number that the official tokenizer gave, to 1e-4 of the tensor's largest magnitude; codes and ids exactly."""

import pytest
import torch
import torch.nn.functional as F
from official import TOLERANCE, assert_close, from_recipe

from dar_lightning.tokenizer.flow import sampling_times, shift_time
from dar_lightning.weights.official_names import TOKENIZER_NAMES, official_name


def test_latents_and_codes(golden):
    latents = golden.model.encoder(golden.inputs["images"])
    assert_close(latents, golden.outputs["latents"][:, :, 0].transpose(1, 2))
    quantized, codes, _, _ = golden.model.quantizer(latents)
    assert_close(quantized, golden.outputs["quant"][:, :, 0].transpose(1, 2))
    assert torch.equal(codes, golden.outputs["codes"].long())
    assert torch.equal(golden.model.tokenize(golden.inputs["images"]), golden.outputs["codes"].long())


def test_conditioning(golden):
    latents = golden.outputs["quant"][:, :, 0].transpose(1, 2)
    assert_close(golden.model.conditioner(latents), golden.outputs["cond"])
    codes = golden.outputs["codes"][: golden.config["decode_batch"]].long()
    assert_close(golden.model.condition(codes), golden.outputs["cond_decode"])


def test_schedule_and_groups(golden):
    config, schedule = golden.model.config, golden.model.schedule
    times = torch.tensor(sampling_times(config.num_groups, config.time_shift))
    assert_close(times, golden.outputs["schedule"])
    starts = [schedule.start(schedule.group_of_step(i, config.num_groups)) for i in range(config.num_groups)]
    assert starts == golden.outputs["decode_group_start"].tolist()
    assert torch.equal(schedule.windows(golden.inputs["sweep_t"]), golden.outputs["sweep_query_ids"].long())
    assert torch.equal(schedule.windows(golden.inputs["train_t"]), golden.outputs["train_query_ids"].long())
    assert_close(shift_time(golden.inputs["train_t"], config.time_shift), golden.outputs["train_t_shifted"])


def test_first_velocity(golden):
    cond = golden.outputs["cond_decode"][:1, : golden.model.config.window]
    with torch.no_grad():
        velocity = golden.model.decoder(golden.inputs["decode_noise"][:1], torch.zeros(1), cond)
    assert_close(velocity, golden.outputs["velocity_first_step"])


@pytest.mark.parametrize("solver", ["euler", "adams2"])
def test_decoded_pixels_and_every_preview(golden, solver):
    tokenizer, noise = golden.model, golden.inputs["decode_noise"]
    codes = golden.outputs["codes"][: golden.config["decode_batch"]].long()
    image = tokenizer.detokenize(codes, noise, solver)
    assert_close(image, golden.outputs[f"decode_{solver}"])
    previews = tokenizer.previews(codes, noise, solver)
    assert_close(previews[:, :-1].transpose(0, 1), golden.outputs[f"preview_{solver}"])
    assert torch.equal(previews[:, -1], image)
    halfway = tokenizer.detokenize(codes, noise, solver, groups=2)
    assert_close(halfway, golden.outputs[f"preview_{solver}"][1])


@pytest.fixture(scope="session")
def training(golden):
    """Losses of the golden training step, and the REPA head's output (B, patches, 768) with its loss."""
    tokenizer, inputs = golden.model, golden.inputs
    losses = tokenizer.training_losses(inputs["images"], inputs["train_t"], inputs["train_noise"])
    projected = tokenizer.decoder.project_hidden(losses["hidden"], (16, 16))
    teacher = from_recipe(golden.config["repa_features"]["seed"], projected.shape)
    similarity = F.cosine_similarity(teacher, projected, dim=-1)
    return losses, projected, (1 - similarity).mean()


def test_training_losses(golden, training):
    losses, _, _ = training
    for i, name in enumerate(("flow", "vq", "commit")):
        assert_close(losses[name], golden.outputs["train_losses"][i])
    assert_close(losses["x1_hat"], golden.outputs["train_pred_x1"])


def test_repa_head(golden, training):
    _, projected, loss = training
    assert_close(projected[:, golden.outputs["h_repa_rows_index"].long()], golden.outputs["h_repa_rows"])
    assert_close(projected.norm(dim=-1), golden.outputs["h_repa_norms"])
    assert_close(loss[None], golden.outputs["train_repa_loss"])


@pytest.mark.parametrize("with_repa", [False, True])
def test_gradient_norm_of_every_parameter(golden, training, with_repa):
    losses, _, repa = training
    key = next(name for name in golden.grad_norms if ("repa" in name) == with_repa)
    expected = dict(golden.grad_norms[key]["per_parameter"])
    total = losses["flow"] + losses["vq"] + losses["commit"] + (0.5 * repa if with_repa else 0)
    golden.model.zero_grad()
    total.backward(retain_graph=True)
    for name, parameter in golden.model.named_parameters():
        norm = expected.pop(official_name(name, TOKENIZER_NAMES))
        if norm is None:
            assert parameter.grad is None, name
            continue
        # Summing millions of squares in float32 costs as much accuracy as is being tested.
        ours = parameter.grad.double().norm().item()
        # Norms below 1e-6 are rounding noise around an exact zero.
        assert ours == pytest.approx(norm, rel=TOLERANCE, abs=1e-6), name
    assert not expected
