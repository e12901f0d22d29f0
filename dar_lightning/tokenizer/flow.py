"""Flow matching between noise (t = 0) and scaled images (t = 1): the shift of time, and ODE solvers."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from dar_lightning.errors import check_range, require

SOLVERS = ("euler", "adams2", "adams2_variable")


def check_diffusion(solver: str, num_steps: int | None) -> None:
    """Refuse a solver that is none, and a number of steps that cannot be taken; None is one per group of tokens."""
    require(solver in SOLVERS, f"solver is {solver!r}: choose from {', '.join(SOLVERS)}")
    check_range(1, 10**5, num_steps=num_steps)


def shift_time(u, beta: float):
    """Flow time of uniform time u in [0, 1] (float or tensor): t = u / (u + beta (1 - u))."""
    return u / (u + beta * (1 - u))


def sampling_times(num_steps: int, beta: float) -> list[float]:
    """Flow times t_0 = 0, ..., t_{S-1} of S steps, and the end, 1: S + 1 numbers."""
    return [shift_time(i / num_steps, beta) for i in range(num_steps)] + [1.0]


def integrate(
    velocity: Callable[[Tensor, int, float], Tensor], x: Tensor, times: Sequence[float], solver: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Solve dx/dt = velocity from times[0] to times[-1], one step at a time.

    "euler" is x += h_i v_i. "adams2" is the official two-step Adams-Bashforth after a first Euler step, with the
    coefficients of equal steps, x += h_i (1.5 v_i - 0.5 v_{i-1}). "adams2_variable" has those of uneven steps: with
    r = h_i / h_{i-1}, x += h_i ((1 + r / 2) v_i - (r / 2) v_{i-1}). Neither is always nearer to the true solution.

    Args:
        velocity: called as velocity(x, step, t), and for step i only when the i-th pair is asked for.
        x: state at times[0], (B, 3, H, W).
        times: increasing flow times, ending in the last state's time.
        solver: one of SOLVERS.

    Yields:
        After each step i: the state at times[i + 1], and the preview, the same step taken up to the last time. After
        the last step the two are equal.
    """
    check_diffusion(solver, len(times) - 1)
    previous: Tensor | float = 0.0
    for i, weights in enumerate(solver_weights(times, solver)):
        v = velocity(x, i, times[i])
        preview, x = [x + h * (now * v - before * previous) for h, now, before in weights]
        previous = v
        yield x, preview


def solver_weights(times: Sequence[float], solver: str) -> Iterator[list[tuple[float, float, float]]]:
    """Coefficients of an ODE solver, step by step: h, and the weights of the new velocity and of minus the one before.

    Two of these triples a step, for the preview and for the state.
    """
    previous_h = None
    for t, t_next in pairwise(times):
        found = []
        for h in (times[-1] - t, t_next - t):
            half_ratio = 0.0
            if solver != "euler" and previous_h is not None:
                half_ratio = 0.5 if solver == "adams2" else 0.5 * h / previous_h
            found.append((h, 1 + half_ratio, half_ratio))
        yield found
        previous_h = t_next - t
