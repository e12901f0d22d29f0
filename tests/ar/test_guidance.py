"""Guidance as a function of the token: closed forms, a plain loop without a cache, and one half that leaves."""

import itertools
import math
from statistics import mean

import pytest
import torch
from refusals import refused
from tiny_models import GROUPS, SIZE, TOKENS, make_ar, make_pipeline, make_tokenizer, seeds

from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar import sampling
from dar_lightning.ar.guidance import (
    SCHEDULES,
    Constant,
    Interval,
    PowerCosine,
    guidance_schedule,
    guided_tokens,
    read_guidance,
)
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.sampling import draw_tokens, generate, stream_tokens
from dar_lightning.errors import UserError

LABELS = torch.tensor([0, 3, 1])
EACH = [1 + i * GROUPS // TOKENS for i in range(TOKENS)]  # the group of each token: 1, 1, 2, 2, 3, 3, 4, 4
FREE = torch.empty(3, 0, dtype=torch.long)


@pytest.fixture(scope="module")
def ar() -> ARModel:
    return make_ar()


def ramp(scale: float, power: float, count: int) -> list[float]:
    return [1 + (scale - 1) * (1 - math.cos(math.pi * (i / count) ** power)) / 2 for i in range(count)]


@torch.no_grad()
def plain(ar: ARModel, scales: list[float], prefix: torch.Tensor = FREE) -> torch.Tensor:
    """Tokens of a loop that computes every token of both halves anew each time."""
    keys, tokens = draw_keys(3, TOKENS, seeds(1, 2, 3), torch.device("cpu")), prefix
    for i in range(prefix.shape[1], TOKENS):
        padded = torch.cat([tokens, torch.zeros(3, TOKENS - i, dtype=torch.long)], dim=1)
        conditional = ar(LABELS, padded)[:, i]
        unconditional = ar(torch.full_like(LABELS, ar.null_class), padded)[:, i]
        logits = unconditional + scales[i] * (conditional - unconditional)
        tokens = torch.cat([tokens, draw_tokens(logits, keys[:, i])[:, None]], dim=1)
    return tokens


def drawn(ar: ARModel, guidance, **options) -> torch.Tensor:
    return generate(ar, LABELS, guidance=guidance, generator=seeds(1, 2, 3), token_groups=EACH, **options)


def test_power_cosine():
    for scale, count in ((3.7, 8), (0.1, 12), (8.0, 256)):
        assert guidance_schedule(PowerCosine(scale, 0), count) == guidance_schedule(scale, count), "bit for bit"
        for power in (0.5, 1.0, 2.75):
            scales = guidance_schedule(f"power_cosine,{scale},{power}", count)
            assert scales == pytest.approx(ramp(scale, power, count), rel=1e-12)
            assert scales[0] == 1.0
            half = 1 + (scale - 1) * (1 - math.cos(math.pi * 2**-power)) / 2
            assert scales[count // 2] == pytest.approx(half, rel=1e-12)
    published = guidance_schedule(PowerCosine(16, 2.75), 256)  # RAR-B
    assert mean(published) == pytest.approx(4.63, abs=0.005)
    assert max(published[:64]) < 1.03


def test_interval_linear_and_constant():
    assert guidance_schedule("interval,3,1,4", TOKENS, EACH) == guidance_schedule(3.0, TOKENS) == [3.0] * TOKENS
    assert guidance_schedule(Interval(3, 2, 3), TOKENS, EACH) == [1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 1.0, 1.0]
    assert guidance_schedule("interval,1,1,4", TOKENS, EACH) == guidance_schedule(1.0, TOKENS)
    assert guidance_schedule("linear,1,8", 3) == guidance_schedule((1.0, 8.0), 3) == pytest.approx([1.001, 4.5005, 8])
    assert guidance_schedule(Constant(2), 3) == guidance_schedule("2", 3) == guidance_schedule(2, 3)


def test_groups_are_those_of_the_pipeline():
    """Of a model that writes the first groups alone, and of a tokenizer whose steps share tokens."""
    assert make_pipeline().token_groups == EACH
    backwards = DARPipeline(make_tokenizer(), make_ar(order="reversed"))
    assert backwards.token_groups == EACH[::-1]
    assert backwards.guidance_scales("interval,3,4,4") == [3.0 if group == 4 else 1.0 for group in EACH[::-1]]
    half = DARPipeline(make_tokenizer(), make_ar(num_tokens=TOKENS // 2))
    assert half.token_groups == EACH[: TOKENS // 2]
    with pytest.raises(UserError, match="from_group 2 to_group 3: this model's tokens are of groups 1 to 2"):
        next(half.stream(LABELS, guidance="interval,3,2,3"))
    shared = DARPipeline(make_tokenizer(tokens_per_step=4), make_ar())  # steps read 0-3, 2-5, 4-7, 4-7
    assert shared.token_groups == [1, 1, 1, 1, 2, 2, 3, 3]
    refused("from_group 4 to_group 4", shared.guidance_scales, "interval,3,4,4")


@pytest.mark.parametrize(
    ("guidance", "scales"),
    [
        ("constant,2.5", [2.5] * TOKENS),
        ("linear,1.1,8", [1.1 + 6.9 * i / (TOKENS - 1) for i in range(TOKENS)]),
        ("power_cosine,8,1.5", ramp(8, 1.5, TOKENS)),
        ("interval,4,1,2", [4.0] * 4 + [1.0] * 4),
        ("interval,scale=4,from_group=2,to_group=3", [1.0] * 2 + [4.0] * 4 + [1.0] * 2),
        ("interval,4,3,4", [1.0] * 4 + [4.0] * 4),
    ],
)
def test_tokens_are_those_of_a_plain_loop(ar, guidance, scales):
    """Of a prefix that ends before, in and after an interval, too."""
    whole = drawn(ar, guidance)
    assert torch.equal(whole, plain(ar, scales))
    assert not torch.equal(whole, drawn(ar, 1.0)), "these labels and seeds tell"
    for length in (1, 4, 7):
        prefix = drawn(ar, 1.0)[:, :length]
        assert torch.equal(drawn(ar, guidance, prefix=prefix), plain(ar, scales, prefix))


@pytest.mark.parametrize("guidance", [3.0, "power_cosine,8,1.5", "interval,4,1,2"])
def test_constants_in_either_half_change_no_token(ar, guidance, monkeypatch):
    expected = drawn(ar, guidance)
    run = ARModel._run

    def shifted(self, x, *given):
        shift = torch.tensor([3.0] * 3 + [-5.0] * 3)[: len(x)]  # of the conditional half and of the other one
        return run(self, x, *given) + shift[:, None, None]

    monkeypatch.setattr(ARModel, "_run", shifted)
    assert torch.equal(drawn(ar, guidance), expected)


def rows_of_steps(monkeypatch) -> list[int]:
    rows, run = [], ARModel._run

    def noting(self, x, *given):
        rows.append(len(x))
        return run(self, x, *given)

    monkeypatch.setattr(ARModel, "_run", noting)
    return rows


@pytest.mark.parametrize(
    ("guidance", "prefix", "rows"),
    [
        ("interval,4,1,2", 0, [6] * 4 + [3] * 4),
        ("interval,4,2,3", 0, [6] * 6 + [3] * 2),
        ("interval,4,2,4", 0, [6] * 8),
        ("interval,4,1,2", 3, [6] + [3] * 4),
        ("interval,4,1,2", 4, [3] * 4),
        (1.0, 0, [3] * 8),
        ((4.0, 1.0), 0, [6] * 8),  # as ever, to the last bit
    ],
)
def test_the_unconditional_half_leaves_after_the_last_guided_token(ar, monkeypatch, guidance, prefix, rows):
    given = drawn(ar, 1.0)[:, :prefix]
    found = rows_of_steps(monkeypatch)
    drawn(ar, guidance, prefix=given)
    assert found == rows


@pytest.mark.parametrize("order", ["coarse_to_fine", "random_per_sample"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed weights", "plain weights"])
def test_the_tokens_are_those_with_both_halves_kept(monkeypatch, order, packed):
    ar = make_ar(order=order)
    if not packed:
        monkeypatch.setattr(sampling, "packed", lambda module, rows: module)
    found = {guidance: drawn(ar, guidance) for guidance in ("interval,4,1,1", "interval,4,2,3")}
    ahead = drawn(ar, "interval,4,1,1", num_tokens=5)
    monkeypatch.setattr(sampling, "guided_tokens", len)
    for guidance, tokens in found.items():
        assert torch.equal(drawn(ar, guidance), tokens)
    if order == "coarse_to_fine":
        assert torch.equal(ahead, found["interval,4,1,1"][:, :5])


def test_a_stream_of_previews_drops_it_too(monkeypatch):
    """With the tokens written ahead on a thread, and without; a closed stream leaves the model as it was."""
    pipe, noise = make_pipeline(), torch.zeros(3, 3, SIZE, SIZE)
    expected = drawn(pipe.ar, "interval,4,2,2")
    rows = rows_of_steps(monkeypatch)
    for overlap in (False, True):
        options = dict(guidance="interval,4,2,2", noise=noise, generator=seeds(1, 2, 3), overlap=overlap)
        previews = list(pipe.stream(LABELS, **options))
        assert torch.equal(previews[-1].codes, expected)
        assert rows == [6] * 4 + [3] * 4
        rows.clear()
    pipe.ar.train()
    stream = stream_tokens(pipe.ar, LABELS, guidance="interval,4,1,1", token_groups=EACH)
    list(itertools.islice(stream, 4))
    stream.close()
    assert pipe.ar.training


def test_a_last_token_alone_keeps_both_halves():
    assert [guided_tokens(scales) for scales in ([], [1.0], [2.0], [1.0, 1.0], [1.0, 2.0])] == [0, 0, 1, 0, 2]
    assert [guided_tokens(scales) for scales in ([2.0, 1.0], [2.0, 1.0, 1.0], [1.0, 2.0, 1.0, 1.0])] == [2, 1, 2]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("3", 3.0),
        ("constant, 3", 3.0),
        ("1.1,8", (1.1, 8.0)),
        ("linear,last=8,first=1.1", (1.1, 8.0)),
        ("power_cosine,15.5,2", "power_cosine,scale=15.5,power=2"),
        ("power_cosine,power=2.0,scale=15.5", "power_cosine,scale=15.5,power=2"),
        (" interval,3.0,to_group=5, from_group=2", "interval,scale=3,from_group=2,to_group=5"),
    ],
)
def test_text_is_read_and_kept_in_one_form(text, read):
    assert read_guidance(text) == read
    assert read_guidance(read) == read
    groups = [1 + i // 2 for i in range(16)]
    assert guidance_schedule(text, 16, groups) == guidance_schedule(read, 16, groups)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ("strong", "guidance is 'strong': give a number, or a,b for linear .* or NAME,value,... with constant, l"),
        ("", "guidance is '': give a number"),
        ("1,2,3", "guidance is '1,2,3': give a number"),
        ((1.0, 2.0, 3.0), r"guidance is \(1.0, 2.0, 3.0\): give a number"),
        ("cosine,3", "guidance is 'cosine,3': give a number"),
        ("power_cosine,3", "power_cosine takes scale, power .*'power'"),
        ("power_cosine,3,1,1", "power_cosine takes scale, power .*too many"),
        ("power_cosine,3,1,speed=2", "power_cosine takes scale, power .*'speed'"),
        ("power_cosine,-3,1", "guidance power_cosine: scale is -3: it must be at least 0"),
        ("power_cosine,3,-1", "guidance power_cosine: power is -1: it must be at least 0"),
        ("power_cosine,much,1", "guidance power_cosine: scale is 'much': it must be a finite number"),
        ("interval,-1,1,2", "guidance interval: scale is -1: it must be at least 0"),
        ("interval,3,0,2", "from_group 0 to_group 2: groups are whole numbers, from 1"),
        ("interval,3,1.5,2", "from_group 1.5 to_group 2: groups are whole numbers, from 1"),
        ("interval,3,3,2", "from_group 3 to_group 2 is empty: to_group must be at least from_group"),
        ("interval,3,2,5", "from_group 2 to_group 5: this model's tokens are of groups 1 to 4"),
        ("nan", "guidance constant: scale is nan: it must be a finite number"),
        (float("inf"), "guidance constant: scale is inf: it must be a finite number"),
        ("no_module.Schedule", "guidance no_module.Schedule: not constant, .* import path of a class.*no_module"),
        ("interval,3,1,2,scale=4", "interval takes scale, from_group, to_group .*multiple values"),
        ("interval,scale=3,scale=4,from_group=1,to_group=2", "it gives a value twice"),
        (f"{__name__}.Squared,big", f"guidance is '{__name__}.Squared,big': {__name__}.Squared: could not convert"),
        ("math.tau", "guidance math.tau: must be a class with a method `scales`, is 6.28"),
    ],
)
def test_bad_guidance_is_one_line(ar, guidance, message):
    refused(message, drawn, ar, guidance)


class Squared:
    """A user's own whose values must be numbers."""

    def __init__(self, scale):
        self.scale = float(scale) ** 2

    def scales(self, groups):
        return [self.scale] * len(groups)


class Listed:
    """A schedule of a user's own; also one that is wrong."""

    def __init__(self, *scales: float):
        self.given = scales

    def scales(self, groups):
        return self.given


def test_an_object_with_scales_is_a_schedule(ar):
    scales = [1.0, 3.0, 0.0, -1.0, 2.0, 1.0, 1.0, 1.0]
    assert torch.equal(drawn(ar, Listed(*scales)), plain(ar, scales))
    for wrong in (scales[:3], [*scales[:-1], math.nan]):
        with pytest.raises(UserError, match=r"its scales are \[1.0, 3.0, 0.0.*need 8 finite numbers"):
            drawn(ar, Listed(*wrong))


def test_a_class_path_runs_no_file_where_it_must_not():
    refused(
        r"guidance is 'no_module\.Schedule,1': give a number", read_guidance, "no_module.Schedule,1", own_classes=False
    )


def test_a_schedule_is_made_once_for_a_drawing(ar, monkeypatch):
    made = []
    monkeypatch.setitem(SCHEDULES, "noted", lambda scale: made.append(scale) or Constant(scale))
    assert torch.equal(drawn(ar, "noted,3"), drawn(ar, 3.0))
    assert made == [3]
