"""Tables of token places: RAR's inputs, the same with a cache, and one table for two where there is one order."""

import pytest
import torch
from refusals import refused
from tiny_models import GROUPS, TOKENS, make_ar, random_codes, seeds

from dar_lightning.ar.model import merge_place_tables
from dar_lightning.ar.sampling import generate, stream_tokens
from dar_lightning.errors import UserError
from dar_lightning.weights.llama import save_llama

LABELS = torch.tensor([0, 3, 1])
CODES = torch.from_numpy(random_codes(3))
BOTH = {"place_tables": "own_and_target", "order_groups": GROUPS}


def test_inputs_are_those_of_rar():
    """Token + own place + next place, one sample and one position after another; the class slot has no own place."""
    ar = make_ar(**BOTH)
    orders = torch.stack([torch.randperm(TOKENS) for _ in LABELS])
    prefix = ar.condition(LABELS).values
    rows = []
    for row, (codes, order) in enumerate(zip(CODES, orders.tolist(), strict=True)):
        inputs = [prefix[row, 0] + ar.place_embedding.weight[order[0]]]
        for index in range(1, TOKENS):
            read = ar.token_embedding.weight[codes[index - 1]] + ar.own_place_embedding.weight[order[index - 1]]
            inputs.append(read + ar.place_embedding.weight[order[index]])
        rows.append(torch.stack(inputs))
    expected = ar.head(ar.norm(ar.hidden(torch.stack(rows))))
    assert torch.allclose(ar(LABELS, CODES, orders), expected, atol=1e-5)


@pytest.mark.parametrize("order", ["coarse_to_fine", "interleaved"])
def test_a_cache_changes_nothing(order):
    ar = make_ar(order=order, **BOTH)
    tokens = torch.stack(list(stream_tokens(ar, LABELS, top_k=1)), dim=1)
    assert torch.equal(ar(LABELS, tokens).argmax(dim=-1), tokens), "the model's own order needs no word"
    assert torch.equal(ar(LABELS, tokens, ar.draw_order(3)), ar(LABELS, tokens))
    assert not torch.allclose(ar(LABELS, tokens, ar.draw_order(3).flip(1)), ar(LABELS, tokens), atol=0.1)


@pytest.mark.parametrize("order", ["coarse_to_fine", "reversed", "interleaved"])
def test_one_table_for_two(order):
    """The merged table is that of a model with the next places alone, in the same order: equal logits and tokens."""
    ar, merged = make_ar(order=order, **BOTH), make_ar(order=order, **BOTH)
    merge_place_tables(merged)
    target = make_ar(order=order, place_tables="target", order_groups=GROUPS)
    assert merged.config == target.config
    assert merged.state_dict().keys() == target.state_dict().keys()
    target.load_state_dict(merged.state_dict())
    logits = ar(LABELS, CODES)
    for model in (merged, target):
        assert torch.equal(model(LABELS, CODES), logits)
        drawn = [generate(each, LABELS, guidance=2.0, generator=seeds(1, 2, 3)) for each in (ar, model)]
        assert torch.equal(*drawn)


def test_what_has_nothing_to_merge_stays():
    for changes in ({}, {"place_tables": "target"}, {"order": "random_per_sample", "place_tables": "own_and_target"}):
        ar, same = make_ar(**changes), make_ar(**changes)
        merge_place_tables(same)
        assert same.config == ar.config
        assert all(map(torch.equal, same.state_dict().values(), ar.state_dict().values()))


def test_what_does_not_fit_is_said(tmp_path):
    refused("place_tables is 'both': choose from as_needed, target, own_and_target", make_ar, place_tables="both")
    with pytest.raises(UserError, match="place_tables is 'target': a Llama is not told where its next token belongs"):
        save_llama(make_ar(place_tables="target"), tmp_path / "out")
