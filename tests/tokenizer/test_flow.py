"""Solvers on a differential equation with a known solution, and the shift of time."""

import math

import pytest
import torch
from refusals import refused

from dar_lightning.tokenizer.flow import integrate, sampling_times, shift_time

# Shifted times are a smooth function of the step, so neighbouring steps tend to equal lengths and constant coefficients
# keep their order; with steps that stay uneven, here short and three times as long in turn, they lose it.
TIMES = {
    "shifted": lambda steps: sampling_times(steps, 2.0),
    "uneven": lambda steps: [(2 * i - i % 2) / (2 * steps) for i in range(steps + 1)],
}


@pytest.mark.parametrize(
    ("solver", "times", "expected"),
    [
        ("euler", "shifted", 1),
        ("adams2", "shifted", 2),
        ("adams2", "uneven", 1),
        ("adams2_variable", "shifted", 2),
        ("adams2_variable", "uneven", 2),
    ],
)
def test_order_of_convergence(solver, times, expected):
    """Of x' = x cos(3 t), x(0) = 1, whose solution is exp(sin(3 t) / 3), between 64 and 512 steps."""

    def error(steps: int) -> float:
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        *_, (x, preview) = integrate(lambda x, step, t: x * math.cos(3 * t), x, TIMES[times](steps), solver)
        assert torch.equal(x, preview), "the last preview is the end"
        return abs(x.item() - math.exp(math.sin(3) / 3))

    assert math.log(error(64) / error(512), 8) == pytest.approx(expected, abs=0.1)


def test_unknown_solver():
    refused("solver is 'heun'", lambda: next(integrate(lambda x, i, t: x, torch.zeros(1, 1, 1, 1), [0.0, 1.0], "heun")))


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_the_shift_divides_the_odds_of_time(beta):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = shift_time(u, beta)
    assert (t[0], t[-1]) == (0, 1)
    assert torch.allclose((t / (1 - t))[1:-1], (u / (1 - u))[1:-1] / beta)
    assert sampling_times(4, beta) == pytest.approx([*t[[0, 25, 50, 75]].tolist(), 1.0])
