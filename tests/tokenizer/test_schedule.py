"""Which tokens a time reads: against exact fractions, for every rounding, K and window."""

from fractions import Fraction
from math import ceil, floor

import pytest
import torch

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


def test_sampling_and_training_windows_never_differ():
    """The official floating-point starts differ by one for K = 22, 23, ..."""
    for num_groups in range(1, 65):
        schedule = GroupSchedule(num_groups * 4, num_groups, 4)
        trained = schedule.windows(torch.arange(num_groups) / num_groups)[:, 0]
        sampled = [schedule.start(schedule.group_of_step(i, num_groups)) for i in range(num_groups)]
        assert trained.tolist() == sampled == [4 * i for i in range(num_groups)]


@pytest.mark.parametrize("window", [4, 8, 12])
@pytest.mark.parametrize("num_steps", [1, 3, 4, 11, 40])
def test_any_number_of_steps_serves_all_groups_in_order(window, num_steps):
    """And never reads a token that is not there yet."""
    schedule = GroupSchedule(32, 4, window)
    groups = [schedule.group_of_step(i, num_steps) for i in range(num_steps)]
    assert groups == [floor(Fraction(i * 4, num_steps) + Fraction(1, 2)) for i in range(num_steps)]
    counts = [schedule.steps_for_groups(m, num_steps) for m in range(1, 5)]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == num_steps, "all groups take all steps"
    for m, steps in enumerate(counts, start=1):
        assert max(schedule.start(group) + window for group in groups[:steps]) <= schedule.tokens_for_groups(m) <= 32


@pytest.mark.parametrize("rounding", ["round", "ceil"])
def test_stratified_times_meet_all_groups_equally_often(rounding):
    schedule = GroupSchedule(256, 8, 32, rounding)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        u = schedule.stratified_times(32, generator)
        assert 0 <= u.min() <= u.max() <= 1
        assert torch.bincount(schedule.windows(u)[:, 0] // 32).tolist() == [4] * 8
