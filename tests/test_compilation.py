"""Whole models as CUDA graphs, by a backend that treats its outputs as a CUDA graph does."""

import pytest
import torch
from tiny_models import GROUPS, SIZE, make_tokenizer, random_codes

from benchmarks.rows import compile_graphs
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer


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
def graphs(monkeypatch) -> Graphs:
    graphs, compiler = Graphs(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda module, mode: compiler(module, backend=graphs, fullgraph=True))
    return graphs


def three(tokenizer: SequentialDiffusionTokenizer) -> tuple:
    return tokenizer.encoder, tokenizer.conditioner, tokenizer.decoder


@torch.no_grad()
def test_each_model_is_one_graph_and_keeps_what_it_has_put_out(graphs):
    plain, compiled = make_tokenizer(decoder_depth=2), make_tokenizer(decoder_depth=2)
    names = list(compiled.state_dict())
    compile_graphs(*three(compiled))
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
