"""Compiled training computes the same: a graph for each kind of block, not cut by DDP nor dropped by another use.

With a backend that needs no compiler and counts the graphs that it is given.
"""

import copy
from collections.abc import Iterator
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from tiny_models import GROUPS, SIZE, TOKENS, make_tokenizer, random_codes
from tiny_training import ar_module, token_data, tokenizer_module, trainer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rows import compile_graphs
from dar_lightning.ar.sampling import generate
from dar_lightning.layers import recompile_limit
from dar_lightning.tokenizer.blocks import GatedBlock
from dar_lightning.training import TokenizerModule


class Counting:
    """Runs graphs as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list):
        self.graphs += 1
        return module.forward


@pytest.fixture
def counting(monkeypatch) -> Iterator[Counting]:
    """The backend of whatever is compiled; torch's settings are those that training makes."""
    backend, compiler = Counting(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiler(module, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield backend
    torch._dynamo.reset()


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def tokenizer_batch(count: int) -> dict[str, torch.Tensor]:
    return {"image": torch.randint(256, (count, 3, SIZE, SIZE), dtype=torch.uint8)}


def ar_batch(count: int) -> dict[str, torch.Tensor]:
    return {"codes": torch.zeros(count, TOKENS, dtype=torch.long), "label": torch.zeros(count, dtype=torch.long)}


PARTS = {  # blocks of encoder, conditioner and decoder; the Llama's
    "tokenizer": (lambda: tokenizer_module({"decoder_depth": 2}, compile=True), tokenizer_batch, 3),
    "ar": (lambda: ar_module(compile=True), ar_batch, 1),
}


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_ddp_cuts_no_block(part, cut, counting, group, monkeypatch):
    """Buckets of gradients are smaller than a block; with torch's own setting each is cut there."""
    build, batch, kinds = PARTS[part]
    module = build()
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    if cut:
        torch._dynamo.config.optimize_ddp = True
    wrapped = DistributedDataParallel(module.train(), bucket_cap_mb=0.001)
    module.forward = module.training_step
    wrapped(batch(4), 1)["loss"].backward()
    torch._dynamo.config.optimize_ddp = False
    assert (counting.graphs > kinds) if cut else (counting.graphs == kinds)
    if part == "ar":
        assert not wrapped.modules_buffers, "constants are not sent"


def test_the_settings_hold_in_the_thread_that_trains(tokens):
    """From torch 2.15 on, each thread has dynamo's settings of its own."""
    module, found = ar_module(compile=True), []

    class Settings(Callback):
        def on_fit_start(self, trainer, pl_module):
            torch._dynamo.config.optimize_ddp = True

        def on_sanity_check_start(self, trainer, pl_module):
            found.append((torch._dynamo.config.optimize_ddp, getattr(torch._dynamo.config, recompile_limit())))

    fit = trainer(Settings(), max_steps=1, num_sanity_val_steps=1)
    with torch.compiler.set_stance("force_eager"):
        thread = Thread(target=fit.fit, args=(module, token_data(tokens)))
        thread.start()
        thread.join()
    assert found == [(False, 64)]


def test_the_limit_of_older_torch(monkeypatch):
    assert recompile_limit() == "recompile_limit"
    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace(cache_size_limit=8))
    assert recompile_limit() == "cache_size_limit"


def test_other_uses_leave_the_tokenizer_compiled(counting):
    """Validation, another size of batches, and streams: encoder and conditioner share their blocks' code."""
    module = tokenizer_module(compile=True)
    step = lambda: module.train().training_step(tokenizer_batch(4), 1)["loss"].backward()  # noqa: E731
    step()
    module.eval()
    tokenizer = module.tokenizer
    with torch.no_grad():
        for count in (4, 3):
            tokenizer.training_losses(torch.rand(count, 3, SIZE, SIZE))
            codes = torch.zeros(count, TOKENS, dtype=torch.long)
            list(tokenizer.stream(codes.split(1, dim=1), tokenizer.draw_noise(count)))
        tokenizer.condition(codes[:1])
        tokenizer.tokenize(torch.rand(1, 3, SIZE, SIZE))
    variants = torch._dynamo.eval_frame._debug_get_cache_entry_list(GatedBlock.forward.__code__)
    assert len(variants) > 8, "more than torch compiles by itself"
    seen = counting.graphs
    step()
    assert counting.graphs == seen


def test_generation_leaves_the_ar_model_compiled(counting, monkeypatch):
    monkeypatch.setattr("dar_lightning.ar.sampling.packed", lambda ar, rows: ar)  # as on a GPU
    module = ar_module(compile=True)
    step = lambda: module.train().training_step(ar_batch(4), 1)["loss"].backward()  # noqa: E731
    step()
    module.eval()
    with torch.no_grad():
        for count in (4, 3):
            module.ar(*reversed(ar_batch(count).values()))
            generate(module.ar, torch.zeros(count, dtype=torch.long), guidance=2.0)
    seen = counting.graphs
    step()
    assert counting.graphs == seen


class Graphs:
    """Stands for mode reduce-overhead: what a graph has put out lasts until the next one runs."""

    def __init__(self):
        self.compiled, self.runs, self.outputs = 0, 0, []

    def __call__(self, module: torch.fx.GraphModule, inputs: list):
        self.compiled += 1

        def run(*arguments):
            self.runs += 1
            for tensor in self.outputs:
                tensor.fill_(torch.nan)
            self.outputs = list(module(*arguments))
            return self.outputs

        return run


@pytest.fixture
def compile_with(monkeypatch):
    """Calls torch.compile with a backend, which must take each thing as one graph."""

    def use(backend) -> None:
        compiler = torch.compile
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda module, **_: compiler(module, backend=backend, fullgraph=True))

    return use


@torch.no_grad()
def test_each_model_is_one_graph_and_keeps_what_it_has_put_out(compile_with):
    compile_with(graphs := Graphs())
    plain, compiled = make_tokenizer(decoder_depth=2), make_tokenizer(decoder_depth=2)
    names = list(compiled.state_dict())
    compile_graphs(compiled.encoder, compiled.conditioner, compiled.decoder)
    assert list(compiled.state_dict()) == names
    images, noise = torch.rand(2, 3, SIZE, SIZE) * 2 - 1, torch.randn(2, 3, SIZE, SIZE)
    codes = plain.tokenize(images)
    assert torch.equal(compiled.tokenize(images), codes)
    assert (graphs.compiled, graphs.runs) == (1, 1)
    expected = plain.previews(codes, noise)
    torch.testing.assert_close(compiled.previews(codes, noise), expected)  # by a solver that reads earlier velocities
    assert graphs.compiled == 3
    assert graphs.runs == 1 + 1 + GROUPS

    columns = torch.from_numpy(random_codes(2)).unbind(1)
    streams = [model.stream((column[:, None] for column in columns), noise) for model in (plain, compiled)]
    for one, other in zip(*streams, strict=True):
        torch.testing.assert_close(other, one)


def test_a_tokenizer_of_compiled_blocks_trains_as_a_plain_one(compile_with):
    """The AR model's are compiled in tests/training/test_fsdp.py, by torch's own backend."""
    compile_with("aot_eager")
    plain = make_tokenizer().train()
    compiled = TokenizerModule(plain.config, compile=True).tokenizer
    compiled.load_state_dict(plain.state_dict())
    parts = (compiled.encoder, compiled.conditioner, compiled.decoder)
    assert all(block._compiled_call_impl is not None for part in parts for block in part.blocks)
    given = torch.rand(3, 3, SIZE, SIZE) * 2 - 1, torch.rand(3), torch.randn(3, 3, SIZE, SIZE)
    flows = [model.training_losses(*given)["flow"] for model in (plain, compiled)]
    torch.testing.assert_close(*flows)
    for flow in flows:
        flow.backward()
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    copied = copy.deepcopy(compiled)  # as EMA does: its blocks must not read the original's weights
    for parameter in compiled.parameters():
        parameter.data.zero_()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.testing.assert_close(copied.training_losses(*given)["flow"], flows[0])
