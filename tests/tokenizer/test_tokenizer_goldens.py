"""Every number that the official tokenizer gave, to 1e-4 of the tensor's largest magnitude; codes and ids exactly."""

import pytest
import torch
import torch.nn.functional as F
from official import TOLERANCE, assert_close, from_recipe

from dar_lightning.tokenizer.flow import sampling_times, shift_time
from dar_lightning.weights.official import TOKENIZER_NAMES, official_name


def test_latents_codes_and_conditioning(golden):
    model, outputs = golden.model, golden.outputs
    quant = outputs["quant"][:, :, 0].transpose(1, 2)
    latents = model.encoder(golden.inputs["images"])
    assert_close(latents, outputs["latents"][:, :, 0].transpose(1, 2))
    quantized, codes, _ = model.quantizer(latents)
    assert_close(quantized, quant)
    assert torch.equal(codes, outputs["codes"].long())
    assert torch.equal(model.tokenize(golden.inputs["images"]), outputs["codes"].long())
    assert_close(model.conditioner(quant), outputs["cond"])
    assert_close(model.condition(codes[: golden.config["decode_batch"]]), outputs["cond_decode"])


def test_schedule_and_groups(golden):
    config, schedule, outputs = golden.model.config, golden.model.schedule, golden.outputs
    assert_close(torch.tensor(sampling_times(config.num_groups, config.time_shift)), outputs["schedule"])
    starts = [schedule.start(schedule.group_of_step(i, config.num_groups)) for i in range(config.num_groups)]
    assert starts == outputs["decode_group_start"].tolist()
    for name in ("sweep", "train"):
        assert torch.equal(schedule.windows(golden.inputs[f"{name}_t"]), outputs[f"{name}_query_ids"].long())
    assert_close(shift_time(golden.inputs["train_t"], config.time_shift), outputs["train_t_shifted"])


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


def test_training_losses_and_gradient_norms(golden):
    """Of the golden training step, without REPA and with it."""
    tokenizer, inputs, outputs = golden.model, golden.inputs, golden.outputs
    losses = tokenizer.training_losses(inputs["images"], inputs["train_t"], inputs["train_noise"])
    for name, expected in zip(("flow", "vq", "commit"), outputs["train_losses"], strict=False):
        assert_close(losses[name], expected)
    assert_close(losses["x1_hat"], outputs["train_pred_x1"])

    projected = tokenizer.decoder.project_hidden(losses["hidden"], (16, 16))  # (B, patches, 768)
    assert_close(projected[:, outputs["h_repa_rows_index"].long()], outputs["h_repa_rows"])
    assert_close(projected.norm(dim=-1), outputs["h_repa_norms"])
    teacher = from_recipe(golden.config["repa_features"]["seed"], projected.shape)
    repa = (1 - F.cosine_similarity(teacher, projected, dim=-1)).mean()
    assert_close(repa[None], outputs["train_repa_loss"])

    total = losses["flow"] + losses["vq"] + losses["commit"]
    for key, norms in golden.grad_norms.items():
        expected = dict(norms["per_parameter"])
        tokenizer.zero_grad()
        (total + 0.5 * repa if "repa" in key else total).backward(retain_graph=True)
        for name, parameter in tokenizer.named_parameters():
            norm = expected.pop(official_name(name, TOKENIZER_NAMES))
            if norm is None:
                assert parameter.grad is None, name
                continue
            # Summing millions of squares in float32 costs as much accuracy as is being tested, and norms below 1e-6 are
            # rounding noise around an exact zero.
            assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=TOLERANCE, abs=1e-6), name
        assert not expected
