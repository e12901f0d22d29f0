"""Solvers on differential equations with known solutions, and flow matching in closed form."""

import math

import pytest
import torch

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.flow import SOLVERS, integrate, interpolate, jump, sampling_times, shift_time


def shifted(steps: int) -> list[float]:
    return sampling_times(steps, 2.0)


def uneven(steps: int) -> list[float]:
    """Short and long steps in turn, one to three."""
    return [(2 * i - i % 2) / (2 * steps) for i in range(steps + 1)]


@pytest.mark.parametrize(
    ("solver", "times_of", "expected"),
    [
        ("euler", shifted, 1),
        # The shifted times are a smooth function of the step, so neighbouring steps tend to equal lengths and constant
        # coefficients keep their order; with steps that stay uneven they lose it.
        ("adams2", shifted, 2),
        ("adams2", uneven, 1),
        ("adams2_variable", shifted, 2),
        ("adams2_variable", uneven, 2),
    ],
)
def test_order_of_convergence(solver, times_of, expected):
    """Of x' = x cos(3 t), x(0) = 1, whose solution is exp(sin(3 t) / 3), between 64 and 512 steps."""

    def error(steps: int) -> float:
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        *_, (x, _) = integrate(lambda x, step, t: x * math.cos(3 * t), x, times_of(steps), solver)
        return abs(x.item() - math.exp(math.sin(3) / 3))

    assert math.log(error(64) / error(512), 8) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
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

    steps = integrate(velocity, torch.zeros(1, 1, 1, 1), shifted(4), "adams2")
    for expected in range(4):
        assert asked == list(range(expected))
        next(steps)


def test_unknown_solver():
    with pytest.raises(UserError, match="unknown solver 'heun'"):
        next(integrate(lambda x, i, t: x, torch.zeros(1, 1, 1, 1), shifted(2), "heun"))


def test_the_true_velocity_jumps_to_the_image():
    x0, x1 = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 1.0])
    x_t = interpolate(x0, x1, t)
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], x1[2])
    assert torch.allclose(jump(x_t, x1 - x0, t), x1, atol=1e-6)
    assert torch.allclose(jump(x_t[1:2], (x1 - x0)[1:2], 0.3), x1[1:2], atol=1e-6)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_the_shift_divides_the_odds_of_time(beta):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = shift_time(u, beta)
    assert (t[0], t[-1]) == (0, 1)
    assert torch.allclose((t / (1 - t))[1:-1], (u / (1 - u))[1:-1] / beta)
    assert sampling_times(4, beta) == pytest.approx([*t[[0, 25, 50, 75]].tolist(), 1.0])
