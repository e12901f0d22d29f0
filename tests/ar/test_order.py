"""Orders of writing: what is written goes back to its place, whatever writes it."""

import pytest
import torch
from tiny_models import AR, GROUPS, SIZE, TOKENS, make_ar, make_tokenizer

from dar_lightning import ARConfig, ARModel, DARPipeline
from dar_lightning.ar.order import ORDERS, fixed_order, placed, random_orders, written
from dar_lightning.ar.sampling import generate, stream_tokens
from dar_lightning.errors import UserError

LABELS = torch.tensor([0, 3, 1])
FIXED = [name for name in ORDERS if name != "random_per_sample"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [seeded(number) for number in numbers]


@pytest.mark.parametrize("name", FIXED)
def test_fixed_orders_are_permutations(name):
    order = fixed_order(name, 12, 4, seed=1)
    assert sorted(order.tolist()) == list(range(12))
    wanted = {
        "coarse_to_fine": list(range(12)),
        "reversed": list(range(11, -1, -1)),
        "interleaved": [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11],
    }
    assert order.tolist() == wanted.get(name, fixed_order(name, 12, 4, seed=1).tolist())
    assert (name == "random") == (order.tolist() != fixed_order(name, 12, 4, seed=2).tolist())


def test_random_orders_are_of_their_samples():
    device = torch.device("cpu")
    orders = random_orders(3, 12, seeds(1, 2, 3), device)
    assert torch.equal(orders[1:2], random_orders(1, 12, seeds(2), device))
    assert (orders.sort(dim=1).values == torch.arange(12)).all()
    assert len({tuple(row) for row in orders.tolist()}) == 3


def test_placed_undoes_written():
    order, values = random_orders(5, 12, seeded(0), torch.device("cpu")), torch.rand(5, 12)
    assert torch.equal(placed(written(values, order), order), values)
    assert torch.equal(written(values, order)[2], values[2][order[2]])


@pytest.mark.parametrize("name", FIXED)
def test_generate_puts_tokens_where_they_belong(name):
    """A model of another order with the same weights writes the same sequence."""
    order = fixed_order(name, TOKENS, GROUPS, seed=5)
    plain = generate(make_ar(), LABELS, guidance=2.0, generator=seeds(1, 2, 3))
    other = generate(
        make_ar(order=name, order_groups=GROUPS, order_seed=5), LABELS, guidance=2.0, generator=seeds(1, 2, 3)
    )
    assert torch.equal(other[:, order], plain)


def test_tokens_that_vary_in_place_are_told_their_place():
    """Cached sampling sees what teacher forcing sees: greedy tokens are the arguments of the largest logits."""
    ar = make_ar(order="random_per_sample")
    order = ar.draw_order(3, seeds(1, 2, 3))
    tokens = torch.stack(list(stream_tokens(ar, LABELS, top_k=1, order=order)), dim=1)
    assert torch.equal(ar(LABELS, tokens, order).argmax(dim=-1), tokens)
    assert not torch.equal(ar(LABELS, tokens, order.flip(1)).argmax(dim=-1), tokens)
    drawn = generate(ar, LABELS, guidance=3.0, generator=seeds(1, 2, 3))
    assert torch.equal(drawn[1:2], generate(ar, LABELS[1:2], guidance=3.0, generator=seeds(2)))


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "coarse_to_fine"])
def test_the_pipeline_decodes_tokens_at_their_places(name):
    pipe = DARPipeline(make_tokenizer(), make_ar(order=name, order_groups=GROUPS))
    noise = torch.randn(3, 3, SIZE, SIZE, generator=seeded(0))
    codes = generate(pipe.ar, LABELS, generator=seeds(1, 2, 3))
    previews = list(pipe.stream(LABELS, noise=noise, generator=seeds(1, 2, 3)))
    assert torch.equal(previews[-1].codes, codes)
    images = torch.stack([preview.images for preview in previews], dim=1)
    assert torch.allclose(images, pipe.tokenizer.previews(codes, noise), atol=1e-4)
    with pytest.raises(UserError, match=f"prefix: this model's order is {name}"):
        pipe.generate(LABELS, prefix=codes[:, :2])


@pytest.mark.parametrize("groups", [1, 3])
def test_the_first_tokens_alone_give_the_preview_after_their_groups(groups):
    count = groups * TOKENS // GROUPS
    pipe = DARPipeline(make_tokenizer(), make_ar(num_tokens=count))
    noise = torch.randn(3, 3, SIZE, SIZE, generator=seeded(0))
    codes = generate(pipe.ar, LABELS, generator=seeds(1, 2, 3))
    assert codes.shape == (3, count)
    images = pipe.generate(LABELS, noise=noise, generator=seeds(1, 2, 3))
    assert torch.allclose(images, pipe.tokenizer.detokenize(codes, noise, groups=groups), atol=1e-5)
    with pytest.raises(UserError, match=f"from 1 to {groups}"):
        pipe.generate(LABELS, groups=groups + 1)


def test_half_a_group_is_refused():
    with pytest.raises(UserError, match=r"num_tokens 3, the tokenizer 8.*whole number of groups \(2, 4, 6, 8\)"):
        DARPipeline(make_tokenizer(), make_ar(num_tokens=3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": "backwards"}, "choose from coarse_to_fine, reversed"),
        ({"order": "interleaved", "order_groups": 3}, "must divide num_tokens, 8"),
        ({"order_seed": -1}, "order_seed is -1"),
    ],
)
def test_impossible_orders(changes, words):
    with pytest.raises(UserError, match=words):
        ARConfig(**AR | changes)


@pytest.mark.parametrize("name", ORDERS)
def test_a_saved_model_keeps_its_order(name, tmp_path):
    ar = make_ar(order=name, order_groups=GROUPS, order_seed=7)
    ar.save_pretrained(tmp_path)
    again = ARModel.from_pretrained(tmp_path)
    assert torch.equal(
        generate(again, LABELS, generator=seeds(1, 2, 3)), generate(ar, LABELS, generator=seeds(1, 2, 3))
    )
