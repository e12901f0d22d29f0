"""What both models share: RoPE, KV cache, activation checkpointing, torch.compile, CUDA graphs, random numbers."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dar_lightning.errors import require

Generators = torch.Generator | list[torch.Generator] | None  # one for the batch, one per sample, or torch's global one


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Apply RoPE to queries or keys: interleaved pairs of x (..., head_dim), angles rotary (..., head_dim / 2, 2).

    In float32 for any x of fewer bits: bfloat16 angles would be off by up to 0.002. Complex multiplication is faster on
    a CPU, and fewer kernels on a GPU, than even and odd channels apart, which are for Apple's mps and for the compiler,
    which knows no complex numbers.
    """
    pairs, rotary = (each if each.itemsize >= 4 else each.float() for each in (x, rotary))
    pairs = pairs.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() or x.device.type == "mps":
        (cos, sin), (even, odd) = rotary.unbind(-1), pairs.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Key-value cache of all attention layers of a model, allocated once.

    Args:
        shape: (layers, batch, heads, capacity, head_dim); capacity is the length of the longest sequence.
        weight: of the model; the cache is on its device, in its dtype or, under autocast, in autocast's.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], weight: Tensor):
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        self.buffer = torch.empty(shape[0], 2, *shape[1:], device=weight.device, dtype=dtype)
        self.length = 0  # of the sequences so far; the model counts on when all layers have written
        self.real: Tensor | None = None  # (batch, P) bool: False for padding at the start, which nothing attends to

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, n, head_dim) after `length`; return views of all (B, heads, m, head_dim)."""
        end = self.length + keys.shape[2]
        k, v = self.buffer[layer]
        k[:, :, self.length : end] = keys
        v[:, :, self.length : end] = values
        return k[:, :, :end], v[:, :, :end]

    def keep(self, batch: int) -> None:
        """Go on with the first `batch` sequences alone; nothing is copied, and no memory given back."""
        self.buffer = self.buffer[:, :, :batch]
        self.real = None if self.real is None else self.real[:batch]


class TableModule(nn.Module):
    """Module with `tables`: non-persistent buffers, such as RoPE's, that follow from its config."""

    def tables(self) -> dict[str, Tensor]:
        """The buffers that are not saved, by name ("trunk.rotary_emb.inv_freq"), computed anew."""
        return {}

    def _apply(self, fn: Callable, recurse: bool = True):
        """Called by `to`, `cuda` and the like: tables keep their dtype, and are filled anew."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        with torch.device("cpu"):
            tables = self.tables()
        for name, table in tables.items():
            was, now = before[name], self.get_buffer(name)
            if now is not was:  # a copy in another dtype, or of nothing, as `to_empty` makes
                owner, _, last = name.rpartition(".")
                setattr(self.get_submodule(owner), last, table.to(now.device))
        return self


def run_block(block: nn.Module, *inputs, recompute: bool):
    """Call a transformer block; with `recompute`, by activation checkpointing: the same gradients, bit for bit."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def compile_blocks(*parts: nn.Module) -> None:
    """Compile each of the transformer blocks of modules with a list `blocks`, in place; parameters keep their names.

    All blocks of a module share their code, so compiling takes the time of one.
    """
    for part in parts:
        for block in part.blocks:
            block.compile()


def check_compiler(device: torch.device) -> None:
    """Raise a UserError if torch.compile has no C++ compiler for a CPU, which torch says only when the code runs."""
    compiler = os.environ.get("CXX", "g++")
    found = device.type != "cpu" or shutil.which(compiler)
    require(found, f"compile: on a CPU this needs a C++ compiler, and there is no {compiler}: leave it out")


def recompile_limit() -> str:
    """The name of dynamo's limit of compiled variants of a function, which is another one before torch 2.7."""
    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


WARM_UPS = 2  # calls before a CUDA graph is captured: the first one compiles and makes libraries' workspaces
STREAMS = 32  # torch hands out so many in turn, then the first one again
_capturing = Lock()
_of_stream: WeakValueDictionary[int, "Graphs"] = WeakValueDictionary()  # who captures on it


class Graphs:
    """CUDA graphs of one step, of which one runs at a time: they share a stream to capture on, and memory.

    A graph keeps the workspace of cuBLAS that its stream had. So graphs that may run at the same time, those of
    different steps, need different streams: the first STREAMS steps of a process that live together get them.

    Args:
        device: of the step's tensors.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = self.pool = None  # until the first capture

    def capture(
        self, function: Callable[[], object], rewind: Callable[[], object], warm_up: Callable[[], object] | None = None
    ) -> Callable[[], object]:
        """A function as a graph, to be called again and again on any stream; on another device, the function itself.

        Args:
            function: reads and writes tensors that stay where they are, and asks the device for no value.
            rewind: makes the next call of `function` do what the last one did. Called after each call before the
                capture, which itself computes nothing.
            warm_up: what is called before the capture, if less than `function` runs all kernels of it once.
        """
        if self.device.type != "cuda":
            return function
        with _capturing, torch.cuda.device(self.device):
            if self.stream is None:
                self.stream, self.pool = self._free_stream(), torch.cuda.graph_pool_handle()
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    (warm_up or function)()
                    rewind()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on with their own work on the device
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                function()
        return graph.replay

    def _free_stream(self) -> "torch.cuda.Stream":
        for _ in range(STREAMS):
            stream = torch.cuda.Stream()
            if _of_stream.setdefault(stream.cuda_stream, self) is self:
                break
        return stream


def can_capture(model: nn.Module) -> bool:
    """Whether a graph may stand for calls of a model: no module has a hook, and no weight is sharded."""
    hooks = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    return not hooks and not any(isinstance(weight, DTensor) for weight in model.parameters())


class IdleSteps:
    """What holds the static tensors and the graphs of a model, between one use and the next.

    Args:
        kept: how many a model keeps.
    """

    def __init__(self, kept: int):
        self.kept, self.lock = kept, Lock()
        # model -> (plan, addresses of its weights, step, CUDA event after its last use)
        self.idle: WeakKeyDictionary[nn.Module, list[tuple[Any, list[int], Any, Any]]] = WeakKeyDictionary()

    @contextmanager
    def use(self, model: nn.Module, plan: Any, make: Callable[[], Any]) -> Iterator[Any]:
        """The idle step of this plan, or a new one, for one user alone.

        Steps of weights that have moved are dropped: their graphs would read what the model no longer has.
        """
        weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
        device = next(model.parameters()).device
        with self.lock:
            idle = self.idle.pop(model, [])
            moved = [each for each in idle if each[1] != weights]
            still = [each for each in idle if each[1] == weights]
            found = next((each for each in still if each[0] == plan), None)
            self.idle[model] = [each for each in still if each is not found]
        self._drop(moved)
        step, event = (make(), None) if found is None else found[2:]
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
        try:
            yield step
        finally:
            event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            with self.lock:
                idle = [*self.idle.get(model, []), (plan, weights, step, event)]
                self.idle[model] = idle[-self.kept :]
            self._drop(idle[: -self.kept])

    def forget(self) -> None:
        """Free all idle steps, which else stay in memory as long as their models."""
        with self.lock:
            idle = [step for kept in self.idle.values() for step in kept]
            self.idle.clear()
        self._drop(idle)

    def _drop(self, steps: list[tuple[Any, list[int], Any, Any]]) -> None:
        """Wait until the device is done with them: their memory may be used by another stream next."""
        for *_, event in steps:
            if event is not None:
                event.synchronize()


def draw_per_sample(draw: Callable[..., Tensor], shape: tuple, generator: Generators, device: torch.device) -> Tensor:
    """Random numbers (samples, ...) on a device; with a list of generators a sample's do not depend on its batch.

    `draw`, torch.randn or its like, is called for the generator's device, so that a CPU generator draws the same for
    every device.

    Raises:
        UserError: for a list of another length.
    """
    if isinstance(generator, list):
        count = len(generator)
        require(count == shape[0], f"generator is a list of {count}: {shape[0]} samples need {shape[0]}")
        return torch.cat([draw_per_sample(draw, (1, *shape[1:]), one, device) for one in generator])
    return draw(shape, generator=generator, device=device if generator is None else generator.device).to(device)


def skip_normals(generator: Generators, size: int, batch: int) -> Generators:
    """Copies of CPU generators, while they themselves go on as if each sample's `size` normal numbers were drawn.

    torch fills a float32 tensor of 16 and more from one 32-bit word a number, and draws the last 16 again where 16 does
    not divide them. To skip the words takes a fifth of the time.

    Returns:
        None, with nothing skipped, where there is no CPU generator or torch draws in another way.
    """
    alone = generator if isinstance(generator, list) else [generator]
    size = size if isinstance(generator, list) else size * batch
    if any(one is None or one.device.type != "cpu" for one in alone) or not _skips_as_torch_draws(size % 16):
        return None
    copies = [one.clone_state() for one in alone]
    for one in alone:
        _skip(one, size)
    return copies if isinstance(generator, list) else copies[0]


def _skip(generator: torch.Generator, size: int) -> None:
    torch.empty(size + 16 * (size % 16 > 0), dtype=torch.int32).random_(generator=generator)


@cache
def _skips_as_torch_draws(rest: int) -> bool:
    drawn, skipped = (torch.Generator().manual_seed(0) for _ in range(2))
    torch.randn(32 + rest, generator=drawn, dtype=torch.float32)
    _skip(skipped, 32 + rest)
    return torch.equal(drawn.get_state(), skipped.get_state())
