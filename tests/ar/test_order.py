"""Orders of writing: what is written goes back to its place, whatever writes it."""

import pytest
import torch
from refusals import refused
from tiny_models import GROUPS, SIZE, TOKENS, make_ar, make_tokenizer, seeds

from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar.order import ORDERS, PER_SAMPLE, fixed_order, placed, written
from dar_lightning.ar.sampling import generate, stream_tokens
from dar_lightning.errors import UserError

LABELS = torch.tensor([0, 3, 1])
FIXED = [name for name in ORDERS if name not in PER_SAMPLE]


def test_fixed_orders_are_permutations():
    assert fixed_order("coarse_to_fine", 12, 4, 1).tolist() == list(range(12))
    assert fixed_order("reversed", 12, 4, 1).tolist() == list(range(11, -1, -1))
    assert fixed_order("interleaved", 12, 4, 1).tolist() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    one, other = (fixed_order("random", 12, 4, seed).tolist() for seed in (1, 2))
    assert sorted(one) == sorted(other) == list(range(12))
    assert one != other


def test_random_orders_are_of_their_samples_and_placed_undoes_written():
    ar, values = make_ar(order="random_per_sample"), torch.rand(3, TOKENS)
    orders = ar.draw_order(3, seeds(1, 2, 3))
    assert torch.equal(orders[1:2], ar.draw_order(1, seeds(2)))
    assert (orders.sort(dim=1).values == torch.arange(TOKENS)).all()
    assert len({tuple(row) for row in orders.tolist()}) == 3
    assert torch.equal(placed(written(values, orders), orders), values)
    assert torch.equal(written(values, orders)[2], values[2][orders[2]])


@pytest.mark.parametrize("name", FIXED)
def test_generate_puts_tokens_where_they_belong(name, tmp_path):
    """A model of another order with the same weights writes the same sequence, and keeps its order when it is saved."""
    order = fixed_order(name, TOKENS, GROUPS, seed=5)
    plain = generate(make_ar(), LABELS, guidance=2.0, generator=seeds(1, 2, 3))
    ar = make_ar(order=name, order_groups=GROUPS, order_seed=5)
    ar.save_pretrained(tmp_path)
    for model in (ar, ARModel.from_pretrained(tmp_path)):
        other = generate(model, LABELS, guidance=2.0, generator=seeds(1, 2, 3))
        assert torch.equal(other[:, order], plain)
    assert torch.equal(generate(ar, LABELS, guidance=2.0, generator=seeds(1, 2, 3), num_tokens=3), plain[:, :3])


def test_tokens_that_vary_in_place_are_told_their_place():
    """Cached sampling sees what teacher forcing sees: greedy tokens are the arguments of the largest logits."""
    ar = make_ar(order="random_per_sample")
    order = ar.draw_order(3, seeds(1, 2, 3))
    tokens = torch.stack(list(stream_tokens(ar, LABELS, top_k=1, order=order)), dim=1)
    assert torch.equal(ar(LABELS, tokens, order).argmax(dim=-1), tokens)
    assert not torch.equal(ar(LABELS, tokens, order.flip(1)).argmax(dim=-1), tokens)
    drawn = generate(ar, LABELS, guidance=3.0, generator=seeds(1, 2, 3))
    assert torch.equal(drawn[1:2], generate(ar, LABELS[1:2], guidance=3.0, generator=seeds(2)))


@pytest.mark.parametrize("name", ["interleaved", "random_per_sample"])
def test_the_pipeline_decodes_tokens_at_their_places(name):
    pipe = DARPipeline(make_tokenizer(), make_ar(order=name, order_groups=GROUPS))
    noise = torch.randn(3, 3, SIZE, SIZE)
    codes = generate(pipe.ar, LABELS, generator=seeds(1, 2, 3))
    previews = list(pipe.stream(LABELS, noise=noise, generator=seeds(1, 2, 3)))
    assert torch.equal(previews[-1].codes, codes)
    images = torch.stack([preview.images for preview in previews], dim=1)
    assert torch.allclose(images, pipe.tokenizer.previews(codes, noise), atol=1e-4)
    refused(f"prefix: this model's order is {name}", pipe.generate, LABELS, prefix=codes[:, :2])


@pytest.mark.parametrize("groups", [1, 3])
def test_the_first_tokens_alone_give_the_preview_after_their_groups(groups):
    count = groups * TOKENS // GROUPS
    pipe = DARPipeline(make_tokenizer(), make_ar(num_tokens=count))
    noise = torch.randn(3, 3, SIZE, SIZE)
    codes = generate(pipe.ar, LABELS, generator=seeds(1, 2, 3))
    assert codes.shape == (3, count)
    images = pipe.generate(LABELS, noise=noise, generator=seeds(1, 2, 3))
    assert torch.allclose(images, pipe.tokenizer.detokenize(codes, noise, groups=groups), atol=1e-5)
    refused(f"from 1 to {groups}", pipe.generate, LABELS, groups=groups + 1)


def test_half_a_group_is_refused():
    with pytest.raises(UserError, match=r"num_tokens 3, the tokenizer 8.*whole number of groups \(2, 4, 6, 8\)"):
        DARPipeline(make_tokenizer(), make_ar(num_tokens=3))
