"""The decoding step of static shapes draws what the model draws, is one graph, and asks the host for nothing."""

import copy
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from refusals import refused
from tiny_models import make_ar, seeds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import kernels
from dar_lightning import ARConfig, ARModel
from dar_lightning.ar import decode_road, decode_step, sampling
from dar_lightning.ar.decode_road import choose_road
from dar_lightning.ar.decode_step import DecodeStep, Drawing, Plan
from dar_lightning.ar.gumbel import draw_keys
from dar_lightning.ar.model import Attention, Block, SwiGLU
from dar_lightning.ar.sampling import generate, stream_tokens

LABELS = torch.tensor([0, 3, 1])
CASES = {
    "plain": {},
    "constant": {"guidance": 3.0},
    "ramp": {"guidance": (1.0, 8.0)},
    "some tokens": {"guidance": "interval,4,2,3", "token_groups": [1, 1, 2, 2, 3, 3, 4, 4]},
    "none to guide after the prefix": {
        "guidance": "interval,4,1,1",
        "token_groups": [1, 1, 2, 2, 3, 3, 4, 4],
        "prefix": torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]]),
    },
    "top-k": {"guidance": 2.0, "top_k": 5, "temperature": 1.3},
    "greedy": {"guidance": 2.0, "top_k": 1},
    "top-p": {"guidance": 2.0, "top_p": 0.8},
    "both filters": {"top_k": 7, "top_p": 0.9},
    "prefix": {"guidance": 2.0, "prefix": torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])},
    "few": {"guidance": 2.0, "num_tokens": 5},
}
MODELS = {
    "every head": {},
    "grouped heads": {"num_kv_heads": 1},
    "reversed": {"order": "reversed"},
    "orders per sample": {"order": "random_per_sample"},
    "two tables of places": {"order": "interleaved", "order_groups": 4, "place_tables": "own_and_target"},
}


PAIRS = [(model, case) for model in MODELS for case in CASES if "prefix" not in CASES[case] or "heads" in model]


@pytest.mark.parametrize(("model", "case"), PAIRS)
def test_it_draws_what_the_model_draws(model, case):
    ar, options = make_ar(**MODELS[model]), CASES[case]
    expected = generate(ar, LABELS, static=False, generator=seeds(4, 5, 6), **options)
    for _ in range(2):  # the second drawing finds a step that is not new
        assert torch.equal(generate(ar, LABELS, static=True, generator=seeds(4, 5, 6), **options), expected)


def test_autocast():
    """Weights are cast once a drawing. The sums before a product are float32 in both, and its factors bfloat16."""
    ar = make_ar()
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (generate(ar, LABELS, static=static, top_k=1, num_tokens=2) for static in (False, True))
    assert torch.equal(one, other)


def test_weights_that_train_and_weights_that_move():
    ar, draw = make_ar(), partial(generate, labels=LABELS, static=True)
    before = draw(ar, generator=seeds(0, 1, 2))
    for change in (lambda weight: weight.mul_(-1), lambda weight: setattr(weight, "data", -weight.data)):
        with torch.no_grad():
            for parameter in ar.blocks.parameters():
                change(parameter)
        after = draw(ar, generator=seeds(0, 1, 2))
        assert torch.equal(after, generate(ar, LABELS, static=False, generator=seeds(0, 1, 2)))
        assert not torch.equal(before, after)
        before = after
    decode_step.steps.forget()
    assert not decode_step.steps.idle


def test_two_drawings_at_a_time_share_nothing():
    ar = make_ar()
    alone = [generate(ar, LABELS, static=True, generator=seeds(n, n, n)) for n in (1, 2)]
    streams = [stream_tokens(ar, LABELS, static=True, generator=seeds(n, n, n)) for n in (1, 2)]
    together = [torch.stack(columns, 1) for columns in zip(*zip(*streams, strict=True), strict=True)]
    assert all(map(torch.equal, alone, together))
    assert len(decode_step.steps.idle[ar]) == 2


def a_drawing(ar, prompt: int = 1, real=None) -> Drawing:
    """Guided, of two sequences, with a prompt of random vectors."""
    config, generator = ar.config, torch.Generator().manual_seed(3)
    keys = draw_keys(2, config.num_tokens, generator, torch.device("cpu"))
    vectors = torch.randn(4, prompt, config.dim, generator=generator)
    order, prefix = ar.draw_order(4, generator), torch.empty(2, 0, dtype=torch.long)
    scales = [2.0] * config.num_tokens
    return Drawing(vectors, real, prefix, order, keys, scales, config.num_tokens, config.num_tokens, 1.0, 0, 1.0)


def test_a_prompt_of_several_places():
    """Padded ones are as if they were not there, but for the positions of the others."""
    ar = make_ar()
    angles = torch.arange(10)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    ar.rotary = torch.stack([angles.cos(), angles.sin()], -1)
    real = torch.tensor([[True, True, False]] * 4)
    one, other = a_drawing(ar, 3, real), a_drawing(ar, 3, real)
    other.prompt[:, 2] = one.prompt[:, 2]
    other.prompt[:, 1] += 1
    hidden = a_drawing(ar, 3, torch.tensor([[True, False, True]] * 4))
    changed = hidden._replace(prompt=hidden.prompt.clone())
    changed.prompt[:, 1] += 1
    draw = [torch.stack([*decode_step.draw_static(ar, each, "graph")], 1) for each in (one, other, hidden, changed)]
    assert not torch.equal(draw[0], draw[1])
    assert torch.equal(draw[2], draw[3])


def test_a_kept_step_forgets_the_padding_of_the_last_drawing():
    ar = make_ar()
    angles = torch.arange(10)[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    ar.rotary = torch.stack([angles.cos(), angles.sin()], -1)
    padded = torch.tensor([[True, False, False]] * 4)
    drawings = [a_drawing(ar, 3, real) for real in (None, padded, None)]
    draw = [torch.stack([*decode_step.draw_static(ar, each, "graph")], 1) for each in drawings]
    assert len(decode_step.steps.idle[ar]) == 1
    assert not torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], draw[2])


def test_a_step_of_other_settings_is_another_one(monkeypatch):
    """A graph would go on with the kernels that it was captured with."""
    ar, draw = make_ar(), partial(generate, labels=LABELS, static=True, num_tokens=1)
    draw(ar)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not torch.backends.cudnn.deterministic)
    draw(ar)
    monkeypatch.undo()
    draw(ar)
    assert len(decode_step.steps.idle[ar]) == 2


def test_one_graph_for_all_positions():
    """torch.compile takes the whole step without a break, and no position makes it compile again."""
    ar, graphs = make_ar(dim=64, num_heads=4, num_kv_heads=2), []
    plan = Plan(2, True, 1, 5, True, torch.float32, False)
    drawing = a_drawing(ar)._replace(top_p=0.9, top_k=5)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    tokens = []
    for compiler in (lambda function: function, partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)):
        step = DecodeStep(ar, plan)
        step.begin(drawing)
        run = compiler(partial(DecodeStep.step, step))
        with torch.no_grad():
            for _ in range(ar.config.num_tokens):
                run(True, step.capacity)
        tokens.append(step.state.tokens)
    assert torch.equal(*tokens)
    assert len(graphs) == 1


class OnDevice(TorchDispatchMode):
    """Fails where an operation reads or makes a tensor of the host. Tensors without values have none to tell it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "cuda" for tensor in tensors), function
        return result


@pytest.mark.parametrize("triton", [False, True])
def test_a_step_asks_the_host_for_nothing(triton):
    with kernels.fake_cuda():
        ar = kernels.make_model(ARConfig.preset("tiny"))
        step = DecodeStep(ar, Plan(2, True, 1, 5, True, torch.bfloat16, triton))
        with OnDevice():
            step.step(True, 32)
            step.step(False, 32)


class Replays:
    """Stands for `Graphs`: no dispatch mode sees what a replay runs, as the host launches none of its kernels."""

    def __init__(self):
        self.captured, self.runs = 0, 0

    def capture(self, function, rewind):
        function()
        rewind()
        self.captured += 1

        def replay():
            self.runs += 1
            with torch.utils._python_dispatch._disable_current_modes():
                function()

        return replay


class Log(TorchDispatchMode):
    """Names of what the host launches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += [] if function.is_view else [function.overloadpacket.__name__]
        return function(*args, **kwargs or {})


def test_a_token_is_one_replay_and_the_copy_that_is_handed_out(monkeypatch):
    """Two graphs, with the unconditional half and without it; nothing else for as long as the model has its weights."""
    replays = Replays()
    monkeypatch.setattr(decode_step, "Graphs", lambda device: replays)
    ar, options = make_ar(), CASES["some tokens"] | {"static": True}
    first = generate(ar, LABELS, generator=seeds(4, 5, 6), **options)
    assert torch.equal(first, generate(ar, LABELS, generator=seeds(4, 5, 6), **options | {"static": False}))
    stream = stream_tokens(ar, LABELS, generator=seeds(4, 5, 6), **options)
    again = [next(stream)]
    with Log() as log:
        again += stream
    assert torch.equal(torch.stack(again, 1), first)
    assert log.names == ["clone"] * 7
    assert (replays.captured, replays.runs) == (2, 16)


def test_kernels_of_the_largest_model_of_the_paper():
    """Compiled for an H200, by Inductor itself; a block is nowhere copied. Calls of the model start 658."""
    config = ARConfig.preset("XL")
    found = kernels.inductor_kernels(config, 64)
    assert found["_layer"] <= 8, "the goal is 12"
    assert config.depth * found["_layer"] + found["_embed"] + found["_finish"] <= 305, "the goal is 370"
    assert kernels.of_calls(config, 64) > 2 * 305


@pytest.fixture
def interpreted(monkeypatch):
    """The Triton kernel, run by Triton's interpreter on a CPU."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from dar_lightning.ar import decode_attention

    for module, name in ((decode_attention, "_attend"), (tl, "sum"), (tl, "max")):
        monkeypatch.setattr(module, name, InterpretedFunction(getattr(module, name).fn))
    return decode_attention.decode_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel(interpreted, dtype):
    """Against torch's attention in float64: grouped heads of a width that is no power of two, padding, a NaN ahead."""
    heads, kv_heads, width, capacity = 4, 2, 12, 70
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, capacity, generator=generator) > 0.3
    for at in (0, 69):
        position, angles = torch.tensor([at]), torch.randn(width // 2, generator=generator)
        rotary = torch.stack([angles.cos(), angles.sin()], -1)[None]
        held = torch.randn(2, 2, kv_heads, capacity, width, generator=generator).to(dtype)
        qkv = torch.randn(2, (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
        expected_cache, sizes = held.double(), (position, heads, kv_heads, capacity)
        expected = decode_step._attend(qkv.double(), expected_cache, seen, rotary, *sizes)
        held[:, :, :, at:] = torch.nan
        found = interpreted(qkv, held, seen, rotary, position, heads, kv_heads)
        error = (found.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 1e-2)
        torch.testing.assert_close(held[..., at, :].double(), expected_cache[..., at, :], rtol=1e-2, atol=1e-2)
        assert held[:, :, :, at + 1 :].isnan().all()


def test_the_kernel_draws_the_same(interpreted, monkeypatch):
    monkeypatch.setattr(decode_step, "_compiled", lambda function: function)
    ar, options = make_ar(), {"guidance": 2.0, "num_tokens": 3}
    expected = generate(ar, LABELS, generator=seeds(4, 5, 6), **options)
    monkeypatch.setattr(sampling, "choose_road", lambda *_: "graph, Triton")
    assert torch.equal(generate(ar, LABELS, generator=seeds(4, 5, 6), **options), expected)


class Negated(ARModel):
    def hidden(self, *inputs):
        return -super().hidden(*inputs)


class Scaled(torch.nn.RMSNorm):
    pass


def exchanged(part: str, other: torch.nn.Module) -> ARModel:
    """A model with another part."""
    ar = copy.deepcopy(make_ar())
    ar.set_submodule(part, other)
    return ar


def test_the_road():
    ar = make_ar()
    assert choose_road(ar) == "eager", "on a CPU"
    assert choose_road(ar, static=True) == "graph"
    handle = ar.blocks[0].register_forward_hook(lambda *_: None)
    assert choose_road(ar) == "eager"
    refused("static: this model's layers", generate, ar, LABELS, static=True)
    handle.remove()
    with kernels.fake_cuda(), mock.patch("torch.cuda.device"):
        decode_road._triton_runs.cache_clear()
        there = kernels.make_model(ARConfig.preset("tiny"))
        assert choose_road(there) == "graph, Triton"
        assert choose_road(there, static=False) == "eager"
    decode_road._triton_runs.cache_clear()


@pytest.mark.parametrize(
    "other",
    [
        Negated(make_ar().config),
        exchanged("blocks.1.ffn_norm", Scaled(64)),
        exchanged("blocks.0.ffn", torch.nn.Sequential()),
        exchanged("blocks.0.attention_norm", torch.nn.RMSNorm(64, eps=1e-2)),
        exchanged("head", torch.nn.Linear(64, 16)),
        exchanged("token_embedding", torch.nn.EmbeddingBag(16, 64)),
        exchanged("blocks.0.attention.query_norm", torch.nn.Identity()),
    ],
    ids=["hidden", "norm", "feed-forward", "epsilon", "bias", "embedding", "one more part"],
)
def test_other_layers_are_called(other, monkeypatch):
    """The step reads the weights itself, and would draw other tokens than the model does."""
    plain = make_ar()
    monkeypatch.setattr(decode_road, "_triton_runs", lambda device: True)
    monkeypatch.setattr(ARModel, "parameters", lambda model: iter([SimpleNamespace(device=torch.device("cuda"))]))
    assert choose_road(plain) == "graph, Triton"
    assert choose_road(other) == "eager"
    monkeypatch.undo()
    refused("static: this model's layers are sharded, replaced", choose_road, other, static=True)


def test_the_parts_of_a_block_are_those_that_the_step_computes():
    """Of which `decode_road` asks Block itself: one more there is one for `decode_step._layer`."""
    linear = dict.fromkeys(("attention.qkv", "attention.out", "ffn.gate", "ffn.up", "ffn.down"), torch.nn.Linear)
    norms = dict.fromkeys(("attention_norm", "ffn_norm"), torch.nn.RMSNorm)
    dropout = dict.fromkeys(("residual_dropout", "ffn_dropout"), torch.nn.Dropout)
    parts = {"": Block, "attention": Attention, "ffn": SwiGLU}
    assert decode_road._our_parts() == parts | linear | norms | dropout


def test_a_triton_that_does_not_run():
    """Its kernel is tried once: it needs a compiler, Python's headers and a driver, and is the one to say so."""
    pytest.importorskip("triton")
    from dar_lightning.ar import decode_attention

    broken = mock.Mock(side_effect=RuntimeError("Python.h: No such file\nand more"))
    replaced = mock.patch.object(decode_attention, "decode_attention", broken)
    with kernels.fake_cuda(), mock.patch("torch.cuda.device"), replaced:
        decode_road._triton_runs.cache_clear()
        there = kernels.make_model(ARConfig.preset("tiny"))
        with pytest.warns(UserWarning, match=r"Triton does not run here \(RuntimeError: Python.h: No such file\)"):
            assert choose_road(there) == "graph"
        assert choose_road(there) == "graph"
    broken.assert_called_once()
    decode_road._triton_runs.cache_clear()
