"""The AR model for any weights: causality, batches, guidance, filters; and where the official one surprises."""

import copy

import pytest
import torch
from refusals import refused
from tiny_models import seeds

from dar_lightning import ARConfig, ARModel
from dar_lightning.ar.guidance import guidance_schedule, guide
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.sampling import draw_tokens, filter_logits, generate, stream_tokens

LABELS = torch.tensor([0, 3, 4])
CODES = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(1))


def lively(**changes) -> ARModel:
    """A small model with random weights everywhere, also in the head, which starts at zero."""
    torch.manual_seed(0)
    ar = ARModel(ARConfig.preset("tiny", **({"num_classes": 5, "vocab_size": 24, "num_tokens": 12} | changes)))
    with torch.no_grad():
        for parameter in ar.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.2))
    return ar.eval()


@pytest.fixture(scope="module", params=[None, 1], ids=["every head", "grouped heads"])
def ar(request) -> ARModel:
    return lively(num_kv_heads=request.param)


def test_a_cast_leaves_the_angles_of_positions_exact(ar):
    channels = ar.config.dim // ar.config.num_heads
    angles = torch.arange(12)[:, None] * 10000.0 ** (-torch.arange(0, channels, 2).double() / channels)
    expected = torch.stack([angles.cos(), angles.sin()], dim=-1)
    for cast in (copy.deepcopy(ar).to(torch.bfloat16), copy.deepcopy(ar).half().float(), copy.deepcopy(ar).double()):
        assert cast.rotary.dtype == torch.float32
        torch.testing.assert_close(cast.rotary.double(), expected, rtol=0, atol=1e-6)
    assert copy.deepcopy(ar).to(device="meta").rotary.is_meta


@pytest.mark.parametrize("position", [0, 5, 10])
def test_a_token_changes_nothing_before_it(ar, position):
    """Bit for bit: logits i predict token i and read only those before; the last token is a target only."""
    changed = CODES.clone()
    changed[:, position] = (changed[:, position] + 1) % 24
    changed[:, 11] = (changed[:, 11] + 1) % 24
    before, after = ar(LABELS, CODES), ar(LABELS, changed)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert not torch.equal(before[:, position + 1], after[:, position + 1])
    changed[:, position] = CODES[:, position]
    assert torch.equal(before, ar(LABELS, changed))


@pytest.mark.parametrize("prefix", [0, 5, 11])
def test_the_cache_continues_a_prefix(ar, prefix):
    with torch.no_grad():
        expected = ar(LABELS, CODES)
        first, cache = ar.start(LABELS, CODES[:, :prefix])
        logits = [first] + [ar.step(CODES[:, i], cache) for i in range(prefix, 11)]
    assert torch.allclose(torch.stack(logits, 1), expected[:, prefix:], atol=1e-5)


def test_bfloat16_is_near_float32(ar):
    expected = ar(LABELS, CODES)
    half = copy.deepcopy(ar).bfloat16()(LABELS, CODES)
    assert half.dtype == torch.float32, "products in bfloat16, logits not"
    # Of the largest magnitude; measured 0.021.
    assert (half - expected).abs().max() / expected.abs().max() < 0.04
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(ar, LABELS, guidance=(1.0, 3.0)).shape == (3, 12)


def test_class_dropout_drops_its_share():
    ar = lively(class_dropout=0.25, token_dropout=0, residual_dropout=0, ffn_dropout=0)
    codes = torch.zeros(2000, 1, dtype=torch.long)
    labels = torch.full((2000,), 2)
    null = ar(torch.tensor([ar.null_class]), codes[:1])
    torch.manual_seed(0)
    dropped = (ar.train()(labels, codes) - null).abs().amax(dim=(1, 2)) < 1e-5
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    assert not ((ar.eval()(labels, codes) - null).abs().amax(dim=(1, 2)) < 1e-5).any()


def test_a_sequence_does_not_depend_on_its_batch(ar):
    together = generate(ar, LABELS, guidance=2.0, generator=seeds(0, 1, 2))
    assert together.dtype == torch.int64
    for i in range(3):
        alone = generate(ar, LABELS[i : i + 1], guidance=2.0, generator=torch.Generator().manual_seed(i))
        assert torch.equal(alone[0], together[i])
    refused("list of 2", generate, ar, LABELS, generator=seeds(0, 1))


def test_a_prefix_is_kept_and_continued(ar):
    whole = generate(ar, LABELS, guidance=(1.1, 8.0), top_k=1)
    for length in (0, 1, 8):
        assert torch.equal(generate(ar, LABELS, guidance=(1.1, 8.0), top_k=1, prefix=whole[:, :length]), whole)
    drawn = generate(ar, LABELS, generator=seeds(0, 1, 2))
    for count in (1, 5):
        assert torch.equal(generate(ar, LABELS, generator=seeds(0, 1, 2), num_tokens=count), drawn[:, :count])
    assert torch.equal(generate(ar, LABELS, generator=seeds(0, 1, 2), prefix=drawn[:, :5]), drawn)


def test_tokens_come_one_at_a_time_and_the_mode_is_put_back(ar):
    ar.train()
    stream = stream_tokens(ar, LABELS, top_k=1)
    first = [next(stream), next(stream)]
    assert not ar.training, "without dropout"
    stream.close()
    assert ar.training
    ar.eval()
    assert torch.equal(torch.stack(first, 1), generate(ar, LABELS, top_k=1)[:, :2])


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    keys = draw_keys(20_000, 1, torch.Generator().manual_seed(0), torch.device("cpu"))[:, 0]
    tokens = draw_tokens(logits.expand(20_000, 4), keys)
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.01)
    assert shares[3] == 0


def test_temperature_divides_logits(ar):
    assert torch.equal(generate(ar, LABELS, temperature=1e-4), generate(ar, LABELS, top_k=1))


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.6, 0.95, 1.0])
def test_nucleus_is_the_smallest_set_with_enough_mass(top_p):
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    kept = filter_logits(logits, 0, top_p).isfinite()
    for row, keep in zip(logits.softmax(-1), kept, strict=True):
        order, mass, expected = row.argsort(descending=True), 0.0, set()
        for token in order.tolist():
            if mass >= top_p:
                break
            expected.add(token)
            mass += row[token].item()
        assert set(keep.nonzero().flatten().tolist()) == expected


def test_top_k_keeps_ties():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert filter_logits(logits, 2, 1.0).isfinite().tolist() == [[True, False, True, True, False]]
    assert [int(filter_logits(logits, k, 1.0).isfinite().sum()) for k in (1, 0, 99)] == [1, 5, 5]


@pytest.mark.parametrize("guidance", [(4.0, 1.0), (0.5, 8.0), (1.0, 1.0), 0.0, 1.0, 3])
def test_any_guidance_schedule_works(ar, guidance):
    """Also those that the official sampler cannot run."""
    tokens = generate(ar, LABELS, guidance=guidance, top_k=1)
    both = torch.cat([LABELS, torch.full_like(LABELS, ar.null_class)])
    logits = ar(both, tokens.repeat(2, 1))
    scales = guidance_schedule(guidance, 12)
    expected = torch.stack([guide(logits[:, i], scale).argmax(-1) for i, scale in enumerate(scales)], dim=1)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_tokens": 13}, "num_tokens"),
        ({"prefix": torch.zeros(3, 12, dtype=torch.long)}, "prefix"),
        ({"prefix": torch.zeros(2, 2, dtype=torch.long)}, "prefix"),
        ({"prefix": torch.full((3, 2), 24)}, "prefix holds tokens from 24 to 24: need 0 to 23"),
        ({"prefix": torch.full((3, 2), -1)}, "prefix holds tokens from -1 to -1"),
        ({"labels": torch.tensor([0, 6, 1])}, "labels are from 0 to 6"),
    ],
)
def test_impossible_options(ar, options, message):
    refused(message, generate, ar, **{"labels": LABELS} | options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads 3"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"depth": 0}, "depth is 0"),
        ({"class_dropout": 1.0}, "class_dropout is 1.0"),
        ({"num_tokens": 10**11}, "num_tokens is 100000000000: it must be at most 65536"),
        ({"norm_eps": -1.0}, "norm_eps is -1"),
        ({"rope_base": float("nan")}, "rope_base is nan"),
        ({"rope_base": float("inf")}, "rope_base is inf"),
        ({"order": "backwards"}, "choose from coarse_to_fine, reversed"),
        ({"order": "interleaved", "order_groups": 3}, "must divide num_tokens, 32"),
        ({"order_seed": -1}, "order_seed is -1"),
    ],
)
def test_impossible_configs(changes, message):
    refused(message, ARConfig.preset, "tiny", **changes)
