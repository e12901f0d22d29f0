"""What must hold for any weights: causality, prefixes, batches, sizes, dtypes; and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny_models import seeds
from torch import Tensor

from dar_lightning import SequentialDiffusionTokenizer, TokenizerConfig

ROUNDING = 2e-5  # other matrix shapes round differently
CODES = torch.arange(32)[None]
TINY = TokenizerConfig.preset("tiny").to_dict()


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected).abs().max() / expected.abs().max()).item()


def random_images(count: int = 2, size=(32, 32)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))


def lively(**changes) -> SequentialDiffusionTokenizer:
    """A small tokenizer with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    tokenizer = SequentialDiffusionTokenizer(TokenizerConfig(**TINY | changes))
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return tokenizer.eval()


@pytest.fixture(scope="module")
def tokenizer() -> SequentialDiffusionTokenizer:
    """Not to be changed."""
    return lively()


@pytest.mark.parametrize("position", [0, 7, 8, -1])
def test_a_token_changes_nothing_before_it(golden, position):
    """Bit for bit."""
    tokenizer, codes = golden.model, golden.outputs["codes"][:1].long()
    position %= codes.shape[1]
    changed = codes.clone()
    changed[:, position] = (changed[:, position] + 1) % tokenizer.config.codebook_size
    before, after = tokenizer.condition(codes), tokenizer.condition(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])

    noise = golden.inputs["decode_noise"][:1]
    before, after = tokenizer.previews(codes, noise), tokenizer.previews(changed, noise)
    group = position // (tokenizer.config.num_tokens // tokenizer.config.num_groups)
    assert torch.equal(before[:, :group], after[:, :group])
    assert not torch.equal(before[:, group], after[:, group])


def test_a_prefix_and_a_stream_are_decoded_as_the_full_sequence(golden):
    tokenizer, codes = golden.model, golden.outputs["codes"][:2].long()
    noise, count = golden.inputs["train_noise"][:2], tokenizer.config.num_groups
    full, previews = tokenizer.condition(codes), tokenizer.previews(codes, noise)
    size = tokenizer.config.num_tokens // count
    for groups in (1, count - 1):
        prefix = codes[:, : groups * size]
        assert relative_error(tokenizer.condition(prefix), full[:, : groups * size]) < ROUNDING
        assert relative_error(tokenizer.detokenize(prefix, noise), previews[:, groups - 1]) < ROUNDING
        assert relative_error(tokenizer.previews(prefix, noise), previews[:, :groups]) < ROUNDING
    for chunk in (1, 3, 64):
        unread = list(codes.split(chunk, dim=1))
        stream = tokenizer.stream((unread.pop(0) for _ in range(len(unread))), noise)
        for group, preview in enumerate(stream, start=1):
            assert relative_error(preview, previews[:, group - 1]) < ROUNDING
            read = codes.shape[1] - sum(part.shape[1] for part in unread)
            assert read < group * size + chunk, "no token was waited for that the group does not read"
        assert group == count


def test_an_image_does_not_depend_on_its_batch(golden):
    tokenizer, images, state = golden.model, golden.inputs["images"], torch.get_rng_state()
    codes = tokenizer.tokenize(images)
    assert torch.equal(codes, torch.cat([tokenizer.tokenize(image[None]) for image in images]))
    together = tokenizer.detokenize(codes, generator=seeds(*range(len(codes))))
    for i in range(len(codes)):
        noise = tokenizer.draw_noise(1, *seeds(i))
        assert relative_error(tokenizer.detokenize(codes[i : i + 1], noise), together[i : i + 1]) < ROUNDING
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn but by the generators"
    refused("list of 2", tokenizer.detokenize, codes, generator=seeds(0, 1))


@pytest.mark.parametrize("size", [(32, 96), (80, 48)])
def test_other_sizes_and_shapes(tokenizer, size):
    images = random_images(size=size)
    codes = tokenizer.tokenize(images)
    assert codes.shape == (2, 32)
    decoded = tokenizer.detokenize(codes, tokenizer.draw_noise(2, size=size))
    assert decoded.shape == images.shape
    assert decoded.isfinite().all()
    assert tokenizer.training_losses(images)["x1_hat"].shape == images.shape
    assert tokenizer.detokenize(codes).shape[-2:] == (64, 64), "the config's size, without noise"


def test_repa_head():
    """On the grid of its teacher, also below 16 x 16 and on 20 x 20, where the official code fails or does not pool."""
    tokenizer = lively(repa_layer=1, decoder_patch_size=4)
    for side in (16, 80):
        hidden = tokenizer.training_losses(torch.zeros(1, 3, side, side))["hidden"]
        assert hidden.shape[-2:] == (side // 4, side // 4)
        assert tokenizer.decoder.project_hidden(hidden, (16, 16)).shape == (1, 256, 768)
    hidden = torch.randn(1, 64, 32, 32)
    pooled = F.avg_pool2d(hidden, 2).flatten(2).transpose(1, 2)  # as the official code where that works
    ours = tokenizer.decoder.project_hidden(hidden, (16, 16))
    torch.testing.assert_close(ours, tokenizer.decoder.repa_head(pooled), atol=1e-5, rtol=1e-5)
    tokenizer.decoder.repa_head = None  # it runs in training only
    tokenizer.previews(CODES, torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_is_near_float32(golden, how):
    """8 bits of mantissa. Measured: 0.008 of conditioning, 0.014 of pixels after 8 steps; 1% of the codes change."""
    codes, noise = golden.outputs["codes"][:1].long(), golden.inputs["decode_noise"][:1]
    expected, cond = golden.model.detokenize(codes, noise), golden.model.condition(codes)
    model = copy.deepcopy(golden.model).bfloat16() if how == "weights" else golden.model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        image, half_cond = model.detokenize(codes, noise), model.condition(codes)
        tokens = model.tokenize(golden.inputs["images"])
        streamed = list(model.stream(codes.split(1, dim=1), noise))
    assert image.dtype == streamed[0].dtype == torch.float32
    for found, exact in ((half_cond, cond), (image, expected), (streamed[-1], expected)):
        assert relative_error(found, exact) < 0.03
    assert (tokens == golden.outputs["codes"]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (dict(group_rounding="ceil"), None),
        (dict(time_shift=1.0), 11),
        (dict(num_groups=1), 11),
        (dict(num_groups=16), None),
        (dict(tokens_per_step=16), 11),
        (dict(tokens_per_step=4), None),
        (dict(low_rank_queries=False), None),
        (dict(prediction="image"), 11),
    ],
    ids=str,
)
def test_variants_train_and_decode(changes, steps):
    tokenizer, images = lively(**changes), random_images()
    losses = tokenizer.training_losses(images)
    (losses["flow"] + losses["vq"] + losses["commit"]).backward()
    assert all(p.requires_grad and (p.grad is None or p.grad.isfinite().all()) for p in tokenizer.parameters())

    codes, noise = tokenizer.tokenize(images), torch.randn(2, 3, 32, 32)
    for solver in ("euler", "adams2", "adams2_variable"):
        previews = tokenizer.previews(codes, noise, solver, num_steps=steps)
        assert previews.shape[1] == tokenizer.config.num_groups
        assert previews.isfinite().all()
        assert torch.equal(previews[:, -1], tokenizer.detokenize(codes, noise, solver, num_steps=steps))


def test_full_rank_queries_hold_what_low_rank_ones_compute(tokenizer):
    full = lively(low_rank_queries=False)
    full.load_state_dict({k: v for k, v in tokenizer.state_dict().items() if "quer" not in k}, strict=False)
    with torch.no_grad():
        full.encoder.queries.weight.copy_(tokenizer.encoder.query_proj(tokenizer.encoder.queries.weight))
    images = random_images(1)
    assert torch.equal(full.encoder(images), tokenizer.encoder(images))


@pytest.mark.parametrize("u", [0.2, 1.0])
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
    tokenizer, images = lively(latent_norm="batch").train(), random_images(4)
    tokenizer.training_losses(images)  # statistics worth the name
    before = {name: buffer.clone() for name, buffer in tokenizer.named_buffers()}
    codes = tokenizer.tokenize(images)
    assert tokenizer.encoder.latent_norm.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in tokenizer.named_buffers())
    assert torch.equal(codes, tokenizer.eval().tokenize(images))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda t, n=n: t.detokenize(torch.zeros(1, n).long()), r"groups of 8|at most 32") for n in (0, 7, 33)),
        *((lambda t, m=m: t.detokenize(CODES, groups=m), "from 1 to 4 groups") for m in (0, 5)),
        (lambda t: t.detokenize(CODES[:, :16], groups=3), "3 groups need 24 tokens: the codes hold 16"),
        (lambda t: t.detokenize(CODES, num_steps=0), "num_steps is 0"),
        (lambda t: t.condition(CODES.float()), "need integers"),
        (lambda t: t.condition(CODES[0]), "need integers"),
        (lambda t: t.condition(CODES - 1), "codes are from -1 to 30: need 0 to 63"),
        (lambda t: t.previews(CODES + 33), "codes are from 33 to 64: need 0 to 63"),
        (lambda t: next(t.stream([CODES + 33], torch.zeros(1, 3, 16, 16))), "need 0 to 63"),
        (lambda t: t.tokenize(torch.zeros(1, 3, 60, 64)), "is not a multiple of encoder_patch_size 16"),
        (lambda t: t.detokenize(CODES, torch.zeros(1, 3, 64, 40)), "is not a multiple of encoder_patch_size 16"),
        (lambda t: t.training_losses(torch.zeros(1, 3, 64, 40)), "is not a multiple of encoder_patch_size 16"),
        (lambda t: lively(tokens_per_step=16).detokenize(CODES[:, :8]), "8 tokens: .* and at least the 16 that"),
    ],
)
def test_what_cannot_be_decoded_or_encoded(tokenizer, call, message):
    refused(message, call, tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name} is 0") for name in ("encoder_patch_size", "head_dim", "encoder_depth", "codebook_dim")),
        *(({name: -64}, f"{name} is -64") for name in ("encoder_dim", "decoder_dim", "conditioner_depth")),
        *(({"data_std": value}, f"data_std is {value}") for value in (float("nan"), float("inf"))),
        ({"time_shift": 0.0}, "time_shift is 0.0"),
        ({"num_groups": 5}, "num_tokens 32 is not a multiple of num_groups 5"),
        ({"num_tokens": 2048}, "num_tokens is 2048"),
        ({"tokens_per_step": 33}, "tokens_per_step is 33"),
        ({"tokens_per_step": 0}, "tokens_per_step is 0"),
        ({"image_size": 66}, "image_size 66"),
        ({"encoder_dim": 100}, "encoder_dim 100"),
        ({"head_dim": 2}, "head_dim is 2: 2-D RoPE"),
        ({"repa_layer": 2}, "repa_layer is 2"),
        ({"group_rounding": "floor"}, "group_rounding is 'floor'"),
        ({"quantizer_options": {"levels": [8, [5]]}}, r"quantizer_options: levels is \[8, \[5\]\]: it must be a"),
    ],
    ids=str,
)
def test_impossible_configs(changes, message):
    refused(f"^{message}[^\n]*$", TokenizerConfig, **TINY | changes)
