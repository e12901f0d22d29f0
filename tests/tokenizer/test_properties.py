"""What must hold for any weights: causality, prefixes, batches, sizes, dtypes."""

import copy

import pytest
import torch
from torch import Tensor

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.blocks import axial_rotary, rotate
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.encoder import query_mask
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

# Other matrix shapes round differently.
ROUNDING = 2e-5


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected).abs().max() / expected.abs().max()).item()


def change(codes: Tensor, position: int, codebook_size: int) -> Tensor:
    codes = codes.clone()
    codes[:, position] = (codes[:, position] + 1) % codebook_size
    return codes


def lively(**changes) -> SequentialDiffusionTokenizer:
    """A small tokenizer with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    tokenizer = SequentialDiffusionTokenizer(TokenizerConfig(**(TokenizerConfig.preset("tiny").to_dict() | changes)))
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return tokenizer.eval()


# ---- causality


@pytest.mark.parametrize("position", [0, 7, 8, 17, -1])
def test_a_token_changes_nothing_before_it(golden, position):
    """Bit for bit."""
    tokenizer, codes = golden.tokenizer, golden.outputs["codes"][:1].long()
    position %= codes.shape[1]
    changed = change(codes, position, tokenizer.config.codebook_size)
    before, after = tokenizer.condition(codes), tokenizer.condition(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])

    noise = golden.inputs["decode_noise"][:1]
    before, after = tokenizer.previews(codes, noise), tokenizer.previews(changed, noise)
    group = position // (tokenizer.config.num_tokens // tokenizer.config.num_groups)
    assert torch.equal(before[:, :group], after[:, :group])
    assert not torch.equal(before[:, group], after[:, group])


def test_a_query_reads_the_image_and_the_queries_up_to_itself():
    mask = query_mask(3, 4)
    expected = [[j < 3 or 3 <= j <= i for j in range(7)] for i in range(7)]
    assert mask.tolist() == expected


def test_a_prefix_is_decoded_as_in_the_full_sequence(golden):
    tokenizer, codes = golden.tokenizer, golden.outputs["codes"][:2].long()
    noise = golden.inputs["train_noise"][:2]
    full, previews = tokenizer.condition(codes), tokenizer.previews(codes, noise)
    size = tokenizer.config.num_tokens // tokenizer.config.num_groups
    for groups in range(1, tokenizer.config.num_groups + 1):
        prefix = codes[:, : groups * size]
        assert relative_error(tokenizer.condition(prefix), full[:, : groups * size]) < ROUNDING
        assert relative_error(tokenizer.detokenize(prefix, noise), previews[:, groups - 1]) < ROUNDING
        assert relative_error(tokenizer.previews(prefix, noise), previews[:, :groups]) < ROUNDING


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_streaming_equals_decoding(golden, chunk):
    tokenizer, codes = golden.tokenizer, golden.outputs["codes"][:1].long()
    noise = golden.inputs["decode_noise"][:1]
    size = tokenizer.config.num_tokens // tokenizer.config.num_groups
    read = []

    def chunks():
        for part in codes.split(chunk, dim=1):
            read.append(part.shape[1])
            yield part

    previews = tokenizer.previews(codes, noise)
    for group, preview in enumerate(tokenizer.stream(chunks(), noise)):
        assert relative_error(preview, previews[:, group]) < ROUNDING
        assert sum(read) < (group + 1) * size + chunk, "no token was waited for that the group does not read"
    assert group + 1 == tokenizer.config.num_groups


# ---- batches and randomness


def test_an_image_does_not_depend_on_its_batch(golden):
    tokenizer, images = golden.tokenizer, golden.inputs["images"]
    codes = tokenizer.tokenize(images)
    alone = torch.cat([tokenizer.tokenize(image[None]) for image in images])
    assert torch.equal(codes, alone)

    generators = [torch.Generator().manual_seed(seed) for seed in range(len(codes))]
    noise = tokenizer.draw_noise(len(codes), [torch.Generator().manual_seed(seed) for seed in range(len(codes))])
    together = tokenizer.detokenize(codes, generator=generators)
    for i in range(len(codes)):
        assert torch.equal(noise[i : i + 1], tokenizer.draw_noise(1, torch.Generator().manual_seed(i)))
        one = tokenizer.detokenize(codes[i : i + 1], generator=[torch.Generator().manual_seed(i)])
        assert relative_error(one, together[i : i + 1]) < ROUNDING
    with pytest.raises(UserError, match="list of 2"):
        tokenizer.detokenize(codes, generator=generators[:2])


def test_encoding_draws_no_random_number(golden):
    tokenizer, codes = golden.tokenizer, golden.outputs["codes"][:1].long()
    state = torch.get_rng_state()
    tokenizer.tokenize(golden.inputs["images"])
    tokenizer.detokenize(codes, golden.inputs["decode_noise"][:1])
    tokenizer.detokenize(codes, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)


# ---- sizes


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32), (80, 48), (128, 128)])
def test_other_sizes_and_shapes(size):
    tokenizer = lively(decoder_patch_size=8)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.tokenize(images)
    assert codes.shape == (2, 32)
    noise = tokenizer.draw_noise(2, size=size)
    decoded = tokenizer.detokenize(codes, noise)
    assert decoded.shape == images.shape
    assert decoded.isfinite().all()
    losses = tokenizer.training_losses(images)
    assert losses["x1_hat"].shape == images.shape


def test_rows_and_columns_are_told_apart():
    """Turning by the angle that the row (first half of the pairs) or the column (second half) gives, one by one."""
    height, width, head_dim = 2, 3, 16
    rotary = axial_rotary(height, width, head_dim)
    x = torch.randn(height * width, head_dim, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary)
    for row in range(height):
        for column in range(width):
            index = row * width + column
            for pair in range(head_dim // 2):
                place, number = (row, pair) if pair < head_dim // 4 else (column, pair - head_dim // 4)
                angle = torch.tensor(place * 10000 ** (-2 * number / (head_dim // 2)))
                a, b = x[index, 2 * pair], x[index, 2 * pair + 1]
                expected = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])
                assert torch.allclose(turned[index, 2 * pair : 2 * pair + 2], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(60, 64), (64, 40)])
def test_sizes_that_the_patches_do_not_divide(size):
    tokenizer = lively()
    with pytest.raises(UserError, match="is not a multiple of"):
        tokenizer.tokenize(torch.zeros(1, 3, *size))
    with pytest.raises(UserError, match="is not a multiple of"):
        lively(decoder_patch_size=16).detokenize(torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 3, *size))


# ---- dtypes

# Of the largest magnitude, in bfloat16 (8 bits of mantissa). Measured: 0.008 of conditioning, 0.014 of pixels after 8
# steps with bfloat16 weights, 0.003 under autocast; 1% of the codes change.
BF16_ERROR = 0.03


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_near_float32(golden, how):
    codes, noise = golden.outputs["codes"][:1].long(), golden.inputs["decode_noise"][:1]
    expected, cond = golden.tokenizer.detokenize(codes, noise), golden.tokenizer.condition(codes)
    if how == "weights":
        half = copy.deepcopy(golden.tokenizer).bfloat16()
        image, half_cond = half.detokenize(codes, noise), half.condition(codes)
        assert (image.dtype, half_cond.dtype) == (torch.float32, torch.bfloat16)
        tokens = half.tokenize(golden.inputs["images"].bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            image, half_cond = golden.tokenizer.detokenize(codes, noise), golden.tokenizer.condition(codes)
            tokens = golden.tokenizer.tokenize(golden.inputs["images"])
    assert relative_error(half_cond, cond) < BF16_ERROR
    assert relative_error(image, expected) < BF16_ERROR
    assert (tokens == golden.outputs["codes"]).float().mean() > 0.9


@pytest.mark.parametrize("prediction", ["velocity", "image"])
@pytest.mark.parametrize("bypass", [False, True])
def test_bfloat16_weights_take_float32_images_and_noise(prediction, bypass):
    half = lively(prediction=prediction, latent_norm="batch", repa_layer=1).bfloat16()
    half.quantizer.bypass = bypass
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codes = half.tokenize(images)
    image, previews = half.detokenize(codes, images), half.previews(codes, images)
    streamed = list(half.stream(codes.split(1, dim=1), images))
    assert image.dtype == previews.dtype == streamed[0].dtype == torch.float32
    assert torch.equal(image, previews[:, -1])
    assert len(streamed) == half.config.num_groups
    losses = half.training_losses(images, noise=images)
    (losses["flow"] + losses["vq"] + losses["commit"]).backward()
    assert all(losses[name].dtype == torch.float32 for name in ("flow", "vq", "commit", "x1_hat"))
    assert half.encoder.to_latent.weight.grad.isfinite().all()


def test_float64_agrees_with_float32(golden):
    codes, noise = golden.outputs["codes"][:1].long(), golden.inputs["decode_noise"][:1]
    double = copy.deepcopy(golden.tokenizer).double().detokenize(codes, noise)
    assert relative_error(golden.tokenizer.detokenize(codes, noise), double) < ROUNDING


# ---- variants


@pytest.mark.parametrize(
    "changes",
    [
        dict(group_rounding="ceil"),
        dict(time_shift=1.0),
        dict(num_groups=1),
        dict(num_groups=16),
        dict(tokens_per_step=16),
        dict(tokens_per_step=4),
        dict(low_rank_queries=False),
        dict(prediction="image"),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [None, 11])
def test_variants_train_and_decode(changes, steps):
    tokenizer = lively(**changes)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = tokenizer.training_losses(images)
    (losses["flow"] + losses["vq"] + losses["commit"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in tokenizer.parameters())

    codes, noise = tokenizer.tokenize(images), torch.randn(2, 3, 32, 32)
    for solver in ("euler", "adams2", "adams2_variable"):
        previews = tokenizer.previews(codes, noise, solver, num_steps=steps)
        assert previews.shape[1] == tokenizer.config.num_groups
        assert previews.isfinite().all()
        assert torch.equal(previews[:, -1], tokenizer.detokenize(codes, noise, solver, num_steps=steps))


def test_full_rank_queries_hold_what_low_rank_ones_compute():
    low, full = lively(), lively(low_rank_queries=False)
    full.load_state_dict({k: v for k, v in low.state_dict().items() if "quer" not in k}, strict=False)
    assert full.encoder.queries.weight.shape == (1024, 64)
    with torch.no_grad():
        full.encoder.queries.weight.copy_(low.encoder.query_proj(low.encoder.queries.weight))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(full.encoder(images), low.encoder(images))


def test_more_steps_than_groups_approach_a_limit():
    """Each group's window serves several steps; the solution of the same equation gets finer."""
    tokenizer = lively(num_groups=1)
    codes, noise = torch.zeros(1, 32, dtype=torch.long), torch.randn(1, 3, 32, 32)
    images = [tokenizer.detokenize(codes, noise, "adams2_variable", num_steps=steps) for steps in (8, 16, 32, 256)]
    errors = [relative_error(image, images[-1]) for image in images[:-1]]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("u", [0.2, 0.99, 1.0])
def test_the_loss_of_an_image_estimate_is_zero_at_the_image(u):
    """At every time, also where sampling bounds 1 - t from below."""
    tokenizer = lively(prediction="image")
    images, u = torch.full((1, 3, 16, 16), 0.5), torch.tensor([u])
    tokenizer.decoder.conv_out.weight.data.zero_()
    tokenizer.decoder.conv_out.bias.data.fill_(tokenizer.config.data_std * 0.5)
    losses = tokenizer.training_losses(images, u)
    assert losses["flow"] < 1e-12
    assert torch.allclose(losses["x1_hat"], images)
    tokenizer.decoder.conv_out.bias.data.zero_()
    assert tokenizer.training_losses(images, u)["flow"].item() == pytest.approx(0.25)


def test_tokenizing_in_training_mode_uses_running_statistics_and_keeps_them():
    tokenizer = lively(latent_norm="batch")
    tokenizer.train()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokenizer.training_losses(images)  # statistics worth the name
    before = {name: buffer.clone() for name, buffer in tokenizer.named_buffers()}
    codes = tokenizer.tokenize(images)
    assert tokenizer.training
    assert tokenizer.encoder.latent_norm.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in tokenizer.named_buffers())
    assert torch.equal(codes, tokenizer.eval().tokenize(images))


# ---- mistakes


@pytest.mark.parametrize("code", [-1, 64])
def test_codes_outside_the_codebook(code):
    tokenizer, codes = lively(), torch.zeros(1, 32, dtype=torch.long)
    codes[0, 3] = code
    for decode in (tokenizer.condition, tokenizer.detokenize, tokenizer.previews):
        with pytest.raises(UserError, match="need 0 to 63"):
            decode(codes)
    with pytest.raises(UserError, match="need 0 to 63"):
        next(tokenizer.stream([codes], torch.zeros(1, 3, 16, 16)))


def test_codes_too_few_for_a_window_wider_than_a_group():
    tokenizer = lively(tokens_per_step=16)
    with pytest.raises(
        UserError, match=r"codes hold 8 tokens: .* groups of 8, and at least the 16 that the first step"
    ):
        tokenizer.detokenize(torch.zeros(1, 8, dtype=torch.long))
    assert tokenizer.detokenize(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {name: 0}
            for name in ("encoder_patch_size", "decoder_patch_size", "head_dim", "encoder_depth", "codebook_dim")
        ),
        *({name: -64} for name in ("encoder_dim", "conditioner_dim", "decoder_dim", "conditioner_depth", "head_dim")),
        *({name: float("nan")} for name in ("data_std", "time_shift")),
        {"data_std": float("inf")},
    ],
    ids=str,
)
def test_impossible_configs(changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"^{name} is [^\n]*$"):
        TokenizerConfig(**(TokenizerConfig.preset("tiny").to_dict() | changes))
