"""Jacobi sampling: the tokens of drawing one by one, for any window, batch, condition and guidance."""

import pytest
import torch
from refusals import refused
from tiny_models import CLASSES, TOKENS, make_ar, make_tokenizer, seeds

from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar.sampling import generate, stream_tokens

LABELS = torch.tensor([0, 3, 1])
CAPTIONS = {"condition": "caption_tokens", "condition_options": {"vocabulary": "[PAD] [UNK] red blue", "length": 3}}


@pytest.mark.parametrize("window", [1, 3, TOKENS])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (
            {"num_kv_heads": 1, "place_tables": "own_and_target"},
            {"guidance": (1.5, 4.0), "top_k": 5, "top_p": 0.9, "temperature": 0.8},
        ),
        ({"order": "random_per_sample"}, {"guidance": "interval,3,1,2", "token_groups": [1] * 2 + [2] * 3 + [3] * 3}),
        (CAPTIONS, {"guidance": 3.0, "num_tokens": 7}),
    ],
    ids=["plain", "filters", "an order per sample, guidance that ends", "captions"],
)
@torch.no_grad()
def test_tokens_are_those_of_drawing_one_by_one(changes, options, window):
    ar = make_ar(**changes).double()
    asked = ar.condition.from_prompts(["red", "blue red", "blue"]) if changes == CAPTIONS else LABELS
    one = torch.stack(list(stream_tokens(ar, asked, generator=seeds(1, 2, 3), **options)), dim=1)
    drawn = torch.stack(list(stream_tokens(ar, asked, generator=seeds(1, 2, 3), jacobi=window, **options)), dim=1)
    assert torch.equal(drawn, one)


@torch.no_grad()
def test_a_prefix_and_a_bias_are_kept():
    ar = make_ar().double()
    prefix = torch.tensor([[3, 1, 2], [0, 0, 0], [5, 6, 7]])
    wanted = torch.zeros(TOKENS, 32).index_fill_(0, torch.tensor(5), -torch.inf)
    wanted[5, 9] = 1e4  # of place 5
    options = dict(prefix=prefix, bias=lambda places: wanted[places], guidance=2.0)
    one = generate(ar, LABELS, generator=seeds(1, 2, 3), **options)
    drawn = generate(ar, LABELS, generator=seeds(1, 2, 3), jacobi=4, **options)
    assert torch.equal(drawn, one)
    assert (drawn[:, 5] == 9).all()
    assert torch.equal(drawn[:, :3], prefix)


def count_passes(ar: ARModel, monkeypatch, **options) -> tuple[int, list[int]]:
    """Passes of one drawing, and after how many of them each token came."""
    passes, read = [], ARModel.read
    monkeypatch.setattr(ARModel, "read", lambda *arguments: passes.append(1) or read(*arguments))
    came = [len(passes) for _ in stream_tokens(ar, LABELS[:1], generator=seeds(1), **options)]
    monkeypatch.undo()
    return len(passes), came


def counting(ar: ARModel, depends: bool) -> ARModel:
    """A model whose next token is the last one plus 1, or always 5, whatever it reads."""
    for parameter in ar.parameters():
        parameter.data.zero_()
    ar.norm.weight.data.fill_(1)
    ar.token_embedding.weight.data.copy_(torch.eye(32))
    ar.class_embedding.weight.data[:, 0] = 1
    ar.head.weight.data.copy_(100 * (torch.eye(32).roll(1, dims=0) if depends else torch.zeros(32, 32)))
    if not depends:
        ar.head.weight.data[5] = 100
    return ar


def test_passes_at_worst_and_at_best(monkeypatch):
    """Where a token is a function of the one before it, a pass gives one; where it depends on none, two give all."""
    chain, free = counting(make_ar(), depends=True), counting(make_ar(), depends=False)
    assert torch.stack(list(stream_tokens(chain, LABELS, jacobi=TOKENS)), 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 3
    assert count_passes(chain, monkeypatch, jacobi=TOKENS) == (8, [1, 2, 3, 4, 5, 6, 7, 8])
    assert count_passes(chain, monkeypatch, jacobi=1) == (8, [1, 2, 3, 4, 5, 6, 7, 8])
    assert count_passes(free, monkeypatch, jacobi=TOKENS) == (2, [1] + [2] * 7)
    assert count_passes(free, monkeypatch, jacobi=4) == (4, [1, 2, 2, 2, 2, 3, 4, 4])


def test_the_pipeline_draws_the_same_images():
    pipe = DARPipeline(make_tokenizer(), make_ar(), CLASSES)
    images = [pipe.generate(LABELS, guidance=2.0, generator=seeds(1, 2, 3), jacobi=window) for window in (0, 5)]
    torch.testing.assert_close(*images)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"jacobi": -1}, r"jacobi is -1: it must be 0 \(off\) or a window of up to 8 tokens$"),
        ({}, {"jacobi": 9}, "a window of up to 8 tokens"),
        ({"tokens_per_pass": 2}, {"jacobi": 4}, "jacobi is 4: this model predicts 2 tokens a pass already"),
        ({}, {"jacobi": 4, "static": True}, "jacobi is 4: it has no step of static shapes, leave static out"),
    ],
)
def test_what_cannot_be_drawn_so(changes, options, message):
    refused(message, lambda: generate(make_ar(**changes), LABELS, **options))
