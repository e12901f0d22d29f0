"""Decoding by a step of static shapes gives the bits of calls of the decoder, in one graph or one for each group."""

from contextlib import closing
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny_models import CODES, GROUPS, SIZE, make_tokenizer, random_codes, seeds

from benchmarks import kernels
from dar_lightning import TokenizerConfig
from dar_lightning.layers import skip_normals
from dar_lightning.tokenizer import diffusion_step

NOISE = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
CODES_OF_TWO = torch.from_numpy(random_codes(2))


@pytest.fixture(scope="module")
def pair():
    """The same tokenizer by calls and by steps."""
    called, replayed = make_tokenizer(), make_tokenizer()
    called.decoder.static, replayed.decoder.static = False, True
    return called, replayed


@pytest.mark.parametrize("solver", ["euler", "adams2", "adams2_variable"])
@pytest.mark.parametrize("num_steps", [None, 7, 2])
def test_it_decodes_the_same_bits(pair, solver, num_steps):
    options = {"noise": NOISE, "solver": solver, "num_steps": num_steps}
    for _ in range(2):  # the second decoding finds a step that is not new
        one, other = (model.detokenize(CODES_OF_TWO, **options) for model in pair)
        assert torch.equal(one, other)
    one, other = (model.previews(CODES_OF_TWO, **options) for model in pair)
    assert torch.equal(one, other)
    streams = (list(model.stream(CODES_OF_TWO.split(1, dim=1), **options)) for model in pair)
    assert all(torch.equal(one, other) for one, other in zip(*streams, strict=True))


def test_the_image_of_the_first_groups(pair):
    one, other = (model.detokenize(CODES_OF_TWO[:, :4], NOISE, groups=2) for model in pair)
    assert torch.equal(one, other)


def test_graphs(pair, monkeypatch):
    """All steps of a decoding are one graph, those of a stream one that is used again; the host sends nothing but x."""
    _, model = pair
    captured, runs = [], []

    def capture(function, rewind, warm_up):
        captured.append(function.args)
        before = [tensor.clone() for tensor in (step.x, step.velocity, step.index)]
        warm_up()
        assert int(step.index) == int(before[2]) + 1, "one step warms up"
        rewind()
        for tensor, old in zip((step.x, step.velocity, step.index), before, strict=True):
            assert torch.equal(tensor, old)
        return lambda: (runs.append(1), function())

    made = diffusion_step.DiffusionStep

    def make(*arguments):
        nonlocal step
        step = made(*arguments)
        return step

    step = None
    monkeypatch.setattr(diffusion_step, "Graphs", lambda device: SimpleNamespace(capture=capture))
    monkeypatch.setattr(diffusion_step, "DiffusionStep", make)
    diffusion_step.steps.forget()
    model.previews(CODES_OF_TWO, NOISE)
    assert captured == [(1,)]
    model.detokenize(CODES_OF_TWO, NOISE)
    model.detokenize(CODES_OF_TWO, NOISE)
    assert captured == [(1,), (GROUPS,)]
    assert len(runs) == GROUPS + 2
    captured.clear()
    many = model.detokenize(CODES_OF_TWO, NOISE, num_steps=37)
    assert captured == [(16,), (5,)], "a graph holds no more"
    assert torch.equal(many, pair[0].detokenize(CODES_OF_TWO, NOISE, num_steps=37))
    diffusion_step.steps.forget()


def test_kernels_of_a_step():
    """Counted; docs/performance.md has the number."""
    assert kernels.of_diffusion_step(TokenizerConfig.preset("v1"), 4) == pytest.approx(629, rel=0.02)


def test_two_streams_at_a_time_share_nothing(pair):
    _, model = pair
    other = CODES - 1 - CODES_OF_TWO
    expected = [list(model.stream(codes.split(1, dim=1), NOISE)) for codes in (CODES_OF_TWO, other)]
    first, second = (model.stream(codes.split(1, dim=1), NOISE) for codes in (CODES_OF_TWO, other))
    with closing(first), closing(second):
        for group in range(GROUPS):
            assert torch.equal(next(first), expected[0][group])
            assert torch.equal(next(second), expected[1][group])


@pytest.mark.parametrize("size", [3 * SIZE * SIZE, 16, 17, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_noise_that_is_set_aside(size, batch):
    """The copies draw it, and the generators go on as if they had."""
    for drawn, skipped in ((seeds(*range(batch)), seeds(*range(batch))), (seeds(7)[0], seeds(7)[0])):
        copies = skip_normals(skipped, size, batch)
        for one, other, copy in zip(*map(listed, (drawn, skipped, copies)), strict=True):
            count = size if isinstance(drawn, list) else size * batch
            assert torch.equal(torch.randn(count, generator=one), torch.randn(count, generator=copy))
            assert torch.equal(one.get_state(), other.get_state())


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


def test_noise_that_is_not_set_aside(pair):
    """No generator of the CPU, or a torch that draws in another way; on a CPU it is drawn at once."""
    assert skip_normals(None, 100, 2) is None
    with mock.patch("dar_lightning.layers._skips_as_torch_draws", return_value=False):
        assert skip_normals(before := seeds(1), 100, 1) is None
    assert torch.equal(before[0].get_state(), seeds(1)[0].get_state())
    one, other = seeds(1, 2), seeds(1, 2)
    draw = pair[0].set_noise_aside(2, one)
    assert torch.equal(draw(), pair[0].draw_noise(2, other))
    assert torch.equal(one[1].get_state(), other[1].get_state())
