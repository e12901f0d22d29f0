"""Which tokens a time reads: against exact fractions, for every rounding, K and window."""

from fractions import Fraction
from math import ceil, floor

import pytest
import torch

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.flow import sampling_times, shift_time
from dar_lightning.tokenizer.schedule import GroupSchedule


def exact_start(u: Fraction, schedule: GroupSchedule) -> int:
    """First token read at time u, in rational arithmetic, from the paper's and the official code's definitions."""
    scaled = u * schedule.num_groups
    group = floor(scaled + Fraction(1, 2)) if schedule.rounding == "round" else max(ceil(scaled) - 1, 0)
    first = Fraction(group * schedule.num_tokens, schedule.num_groups)
    return min(floor(first), schedule.num_tokens - schedule.window)


@pytest.mark.parametrize("rounding", ["round", "ceil"])
@pytest.mark.parametrize(("num_tokens", "num_groups", "window"), [(256, 8, 32), (32, 4, 12), (32, 4, 4), (24, 1, 24)])
def test_training_windows(rounding, num_tokens, num_groups, window):
    schedule = GroupSchedule(num_tokens, num_groups, window, rounding)
    fractions = [Fraction(i, 1024) for i in range(1025)]  # exact in float32
    windows = schedule.windows(torch.tensor([float(u) for u in fractions]))
    assert windows.dtype == torch.int64
    assert windows[:, 0].tolist() == [exact_start(u, schedule) for u in fractions]
    assert torch.equal(windows, windows[:, :1] + torch.arange(window))
    assert 0 <= windows.min() <= windows.max() < num_tokens


@pytest.mark.parametrize("num_groups", range(1, 65))
def test_sampling_and_training_windows_never_differ(num_groups):
    """The official floating-point starts differ by one for K = 22, 23, ..."""
    schedule = GroupSchedule(num_groups * 4, num_groups, 4)
    trained = schedule.windows(torch.arange(num_groups) / num_groups)[:, 0]
    sampled = [schedule.start(schedule.group_of_step(i, num_groups)) for i in range(num_groups)]
    assert trained.tolist() == sampled == [4 * i for i in range(num_groups)]


@pytest.mark.parametrize("num_steps", [1, 3, 8, 11, 16, 40])
def test_any_number_of_steps_serves_all_groups_in_order(num_steps):
    schedule = GroupSchedule(32, 8, 4)
    groups = [schedule.group_of_step(i, num_steps) for i in range(num_steps)]
    assert groups == [floor(Fraction(i * 8, num_steps) + Fraction(1, 2)) for i in range(num_steps)]
    counts = [schedule.steps_for_groups(m, num_steps) for m in range(1, 9)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == num_steps, "all groups take all steps"


@pytest.mark.parametrize(("num_tokens", "num_groups", "window"), [(32, 4, 8), (32, 4, 12), (32, 4, 4)])
@pytest.mark.parametrize("num_steps", [4, 8, 13])
def test_a_step_never_reads_a_token_that_is_not_there_yet(num_tokens, num_groups, window, num_steps):
    schedule = GroupSchedule(num_tokens, num_groups, window)
    for groups in range(1, num_groups + 1):
        steps = schedule.steps_for_groups(groups, num_steps)
        ends = [schedule.start(schedule.group_of_step(i, num_steps)) + window for i in range(steps)]
        assert max(ends) <= schedule.tokens_for_groups(groups) <= num_tokens


def test_training_mass_of_the_groups():
    """Official rounding: half of a middle group's for the first, 1.5 times for the last; the paper's: all equal."""
    u = (torch.arange(16_000) + 0.5) / 16_000
    mass = {}
    for rounding in ("round", "ceil"):
        starts = GroupSchedule(256, 8, 32, rounding).windows(u)[:, 0]
        mass[rounding] = (torch.bincount(starts // 32) / len(u)).tolist()
    assert mass["round"] == pytest.approx([1 / 16] + [1 / 8] * 6 + [3 / 16], abs=1e-3)
    assert mass["ceil"] == pytest.approx([1 / 8] * 8, abs=1e-3)


@pytest.mark.parametrize("rounding", ["round", "ceil"])
def test_stratified_times_train_all_groups_equally_often(rounding):
    schedule = GroupSchedule(256, 8, 32, rounding)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        u = schedule.sample_time(32, "stratified", generator)
        assert 0 <= u.min() <= u.max() <= 1
        assert torch.bincount(schedule.windows(u)[:, 0] // 32).tolist() == [4] * 8
    uniform = schedule.sample_time(4096, "uniform", generator)
    assert uniform.sort().values.sub(torch.arange(4096) / 4096).abs().max() < 0.05
    with pytest.raises(UserError, match="time_sampling is 'even'"):
        schedule.sample_time(4, "even")


@pytest.mark.parametrize("groups", [0, -1, 5])
def test_no_such_preview(groups):
    with pytest.raises(UserError, match="from 1 to 4"):
        GroupSchedule(32, 4, 8).tokens_for_groups(groups)


@pytest.mark.parametrize("beta", [1.0, 2.0, 4.0])
def test_time_shift(beta):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = shift_time(u, beta)
    assert (t[0], t[-1]) == (0, 1)
    assert (t.diff() > 0).all()
    # The shift divides the odds of t by beta.
    inside = u[1:-1]
    odds = t[1:-1] / (1 - t[1:-1])
    assert torch.allclose(odds, inside / (1 - inside) / beta)
    times = sampling_times(4, beta)
    assert times[-1] == 1.0
    assert times[:-1] == pytest.approx([i / 4 / (i / 4 + beta * (1 - i / 4)) for i in range(4)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups 5"),
        ({"num_tokens": 2048}, "num_tokens is 2048"),
        ({"tokens_per_step": 33}, "tokens_per_step is 33"),
        ({"tokens_per_step": 0}, "tokens_per_step is 0"),
        ({"image_size": 66}, "image_size 66"),
        ({"encoder_dim": 100}, "encoder_dim 100"),
        ({"repa_layer": 2}, "repa_layer is 2"),
        ({"group_rounding": "floor"}, "group_rounding is 'floor'"),
        ({"time_shift": 0.0}, "time_shift 0.0"),
    ],
)
def test_impossible_configs(change, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(**(TokenizerConfig.preset("tiny").to_dict() | change))
    with pytest.raises(UserError, match="unknown tokenizer preset 'v2'"):
        TokenizerConfig.preset("v2")
