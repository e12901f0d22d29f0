"""Solvers on differential equations with known solutions, and flow matching in closed form."""

import math

import pytest
import torch

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.flow import integrate, interpolate, jump, sampling_times

# x' = x cos(3 t), x(0) = 1 has the solution exp(sin(3 t) / 3).
SOLUTION = math.exp(math.sin(3) / 3)


def solve(solver: str, times: list[float]) -> float:
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for state, _ in integrate(lambda x, step, t: x * math.cos(3 * t), x, times, solver):
        x = state
    return x.item()


def order(solver: str, times_of) -> float:
    """Exponent of the error's decay between 64 and 512 steps."""
    coarse, fine = (abs(solve(solver, times_of(steps)) - SOLUTION) for steps in (64, 512))
    return math.log(coarse / fine, 8)


def even(steps: int) -> list[float]:
    return [i / steps for i in range(steps + 1)]


def shifted(steps: int) -> list[float]:
    return sampling_times(steps, 2.0)


def uneven(steps: int) -> list[float]:
    """Short and long steps in turn, one to three."""
    return [(2 * i - i % 2) / (2 * steps) for i in range(steps + 1)]


@pytest.mark.parametrize(
    ("solver", "times_of", "expected"),
    [
        ("euler", even, 1),
        ("euler", shifted, 1),
        ("adams2", even, 2),
        # The shifted times are a smooth function of the step, so neighbouring steps tend to equal lengths and constant
        # coefficients keep their order; with steps that stay uneven they lose it.
        ("adams2", shifted, 2),
        ("adams2", uneven, 1),
        ("adams2_variable", even, 2),
        ("adams2_variable", shifted, 2),
        ("adams2_variable", uneven, 2),
    ],
)
def test_order_of_convergence(solver, times_of, expected):
    assert order(solver, times_of) == pytest.approx(expected, abs=0.1)


def test_variable_steps_equal_constant_ones_where_steps_are_even():
    assert solve("adams2_variable", even(16)) == pytest.approx(solve("adams2", even(16)), rel=1e-12)
    assert solve("adams2_variable", shifted(8)) != pytest.approx(solve("adams2", shifted(8)), rel=1e-4)


def test_variable_steps_are_exact_where_velocity_is_linear_in_time():
    """After the first step, of order one: x' = 6 t - 1 from the exact state at times[1]."""
    times = shifted(8)
    ends = {}
    for solver in ("adams2", "adams2_variable"):
        start = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        states = [x.item() for x, _ in integrate(lambda x, i, t: torch.full_like(x, 6 * t - 1), start, times, solver)]
        first_error = states[0] - (3 * times[1] ** 2 - times[1])
        ends[solver] = states[-1] - first_error
    assert ends["adams2_variable"] == pytest.approx(2.0, rel=1e-12)
    assert abs(ends["adams2"] - 2.0) > 0.01


def test_adams2_is_the_official_update():
    times, v = shifted(4), [1.0, -2.0, 0.5, 3.0]
    x = 0.25
    for i in range(4):
        h = times[i + 1] - times[i]
        x += h * (v[i] if i == 0 else 1.5 * v[i] - 0.5 * v[i - 1])
    ours = list(integrate(lambda x, i, t: torch.full_like(x, v[i]), torch.full((1, 1, 1, 1), 0.25), times, "adams2"))
    assert ours[-1][0].item() == pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("solver", ["euler", "adams2", "adams2_variable"])
def test_previews_reach_for_the_end_and_the_last_is_the_state(solver):
    """Along a straight path every preview is already the end."""
    steps = list(integrate(lambda x, i, t: torch.full_like(x, 3.0), torch.zeros(2, 1, 1, 1), shifted(5), solver))
    assert len(steps) == 5
    assert all(preview.flatten().tolist() == pytest.approx([3.0, 3.0]) for _, preview in steps)
    assert steps[-1][0] is steps[-1][1]


def test_velocities_are_asked_for_one_at_a_time():
    """Conditioning may arrive while the solver runs."""
    asked = []

    def velocity(x, step, t):
        asked.append(step)
        return x

    steps = integrate(velocity, torch.zeros(1, 1, 1, 1), even(4), "adams2")
    for expected in range(4):
        assert asked == list(range(expected))
        next(steps)


def test_unknown_solver():
    with pytest.raises(UserError, match="unknown solver 'heun'"):
        next(integrate(lambda x, i, t: x, torch.zeros(1, 1, 1, 1), even(2), "heun"))


def test_the_true_velocity_jumps_to_the_image():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 3, 3, 4, 4, generator=generator)
    t = torch.tensor([0.0, 0.3, 1.0])
    x_t = interpolate(x0, x1, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], x1[2])
    assert torch.allclose(jump(x_t, x1 - x0, t), x1, atol=1e-6)
    assert torch.allclose(jump(x_t[1:2], (x1 - x0)[1:2], 0.3), x1[1:2], atol=1e-6)
