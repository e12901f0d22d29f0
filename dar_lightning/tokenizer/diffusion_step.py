"""A diffusion step and the solver's update with static shapes, which CUDA replays as a graph; all in one to decode."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from dar_lightning.devices import kernel_settings, no_cudnn_attention
from dar_lightning.layers import Graphs, IdleSteps
from dar_lightning.tokenizer.flow import integrate, solver_weights

MOST = 16  # steps in a graph

steps = IdleSteps(kept=2)


class Trajectory(NamedTuple):
    """The diffusion steps of a decoding."""

    times: tuple[float, ...]  # of the flow: of each step, and of the end
    starts: tuple[int, ...]  # of each step, the first conditioning vector that it reads
    window: int  # how many it reads
    num_tokens: int  # conditioning vectors in all, N
    solver: str


class Plan(NamedTuple):
    """What the tensors and graphs of a step depend on."""

    trajectory: Trajectory
    shape: tuple[int, ...]  # of the images, (B, 3, H, W)
    dim: int  # of conditioning vectors
    dtype: torch.dtype  # of the same
    autocast: torch.dtype | None  # what autocast casts to, if it is on
    settings: tuple  # of torch that choose kernels


Conditions = Iterable[tuple[int, Tensor]]  # steps that can be done in all, with the vectors (B, m, D) so far


def call_steps(
    decoder: nn.Module,
    trajectory: Trajectory,
    noise: Tensor,
    conds: Conditions,
    correct: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Decode by calls of the pixel decoder: after each pair of `conds`, the preview of `flow.integrate`.

    Args:
        decoder: the pixel decoder.
        trajectory: of the decoding.
        noise: (B, 3, H, W) float32.
        conds: see Conditions.
        correct: gives the velocity to use, of the decoder's.
    """

    def velocity(x: Tensor, step: int, t: float) -> Tensor:
        start = trajectory.starts[step]
        time = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
        v = decoder(x, time, cond[:, start : start + trajectory.window])
        return v if correct is None else correct(v)

    states, done = integrate(velocity, noise, trajectory.times, trajectory.solver), 0
    for allowed, cond in conds:  # noqa: B007  (velocity reads cond)
        while done < allowed:
            _, preview = next(states)
            done += 1
        yield preview


def replay_steps(decoder: nn.Module, trajectory: Trajectory, noise: Tensor, conds: Conditions) -> Iterator[Tensor]:
    """The same by a step that is kept for the next decoding; the steps that a pair allows are one graph,
    or several of at most MOST.

    What it yields lasts until it is asked for more.
    """
    device, step = noise.device, None
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with ExitStack() as stack:
        for allowed, cond in conds:
            if step is None:
                plan = Plan(trajectory, tuple(noise.shape), cond.shape[-1], cond.dtype, autocast, kernel_settings())
                step = stack.enter_context(steps.use(decoder, plan, partial(DiffusionStep, decoder, plan, device)))
                step.begin(noise)
            step.extend(cond)
            step.advance(allowed - step.done)
            yield step.preview


class DiffusionStep:
    """A step of one decoder and plan: its tensors, and on CUDA its graphs. Which step comes next is on the device."""

    def __init__(self, decoder: nn.Module, plan: Plan, device: torch.device):
        # weak: what is kept for a decoder must not keep it
        self.decoder, self.plan, self.device = ref(decoder), plan, device
        self.graphs: dict[int, Callable[[], None]] = {}
        self.captured = Graphs(device)
        with torch.inference_mode(False), torch.no_grad():
            new = partial(torch.zeros, device=device)
            self.x, self.velocity, self.preview = new(plan.shape), new(plan.shape), new(plan.shape)
            trajectory = plan.trajectory
            self.cond = new(plan.shape[0], trajectory.num_tokens, plan.dim, dtype=plan.dtype)
            self.index = new(1, dtype=torch.long)
            self.times = torch.tensor(trajectory.times, dtype=torch.float32, device=device)
            self.starts = torch.tensor(trajectory.starts, device=device)
            weights = [*solver_weights(trajectory.times, trajectory.solver)]
            self.weights = torch.tensor(weights, dtype=torch.float32, device=device)  # (steps, 2, 3)
            self.offsets = torch.arange(trajectory.window, device=device)

    def begin(self, noise: Tensor) -> None:
        """Set the state to the noise (B, 3, H, W) that the diffusion starts from."""
        with torch.inference_mode(False), torch.no_grad():
            self.x.copy_(noise)
            self.velocity.zero_()  # the first step has none before it
            self.index.zero_()
        self.done = self.known = 0

    def extend(self, cond: Tensor) -> None:
        """Copy the conditioning vectors that have become known since the last call."""
        with torch.inference_mode(False), torch.no_grad():
            self.cond[:, self.known : cond.shape[1]].copy_(cond[:, self.known :])
        self.known = cond.shape[1]

    def advance(self, count: int) -> None:
        """Run the next `count` diffusion steps."""
        plan = self.plan
        # casts that autocast remembers would be of another graph, or of none
        cast = torch.autocast(self.device.type, plan.autocast, cache_enabled=False) if plan.autocast else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), cast:
            for size in [MOST] * (count // MOST) + [count % MOST] * (count % MOST > 0):
                if size not in self.graphs:
                    state = [self.x, self.velocity, self.index]
                    rewind = partial(torch._foreach_copy_, state, [tensor.clone() for tensor in state])
                    with no_cudnn_attention():
                        function = partial(self._steps, size)
                        self.graphs[size] = self.captured.capture(function, rewind, warm_up=self.step)
                self.graphs[size]()
        self.done += count

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        """One diffusion step: decoder and solver update. A CUDA graph captures one, or several."""
        window = self.starts.index_select(0, self.index) + self.offsets
        time = self.times.index_select(0, self.index).expand(len(self.x))
        velocity = self.decoder()(self.x, time, self.cond.index_select(1, window))
        weights = self.weights.index_select(0, self.index)[0].unbind()
        for target, (h, now, before) in zip((self.preview, self.x), weights, strict=True):
            target.copy_(self.x + h * (now * velocity - before * self.velocity))
        self.velocity.copy_(velocity)
        self.index.add_(1)
