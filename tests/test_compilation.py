"""torch.compile of blocks and of whole models changes nothing: with backends that need no C++ compiler."""

import copy

import pytest
import torch
from tiny_models import GROUPS, SIZE, make_tokenizer, random_codes

from benchmarks.rows import compile_graphs
from dar_lightning.training import TokenizerModule


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
