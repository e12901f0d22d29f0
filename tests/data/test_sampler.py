"""The order of the data: permutations that keep to windows of shards, cut over any number of ranks."""

import pytest

from dar_lightning.data.sampler import EvalSampler, TrainSampler, shuffled


def test_shuffled_is_a_local_permutation():
    sizes = [5, 3, 8, 4]
    orders = [shuffled(sizes, seed=0, epoch=epoch, window=2) for epoch in range(5)]
    for order in orders:
        assert sorted(order) == list(range(20))
        shard_of = [next(i for i, end in enumerate((5, 8, 16, 20)) if index < end) for index in order]
        one, two = list(dict.fromkeys(shard_of))[:2]
        cut = sizes[one] + sizes[two]  # the first window ends here
        assert set(shard_of[:cut]).isdisjoint(shard_of[cut:])
        assert shard_of[:cut] != sorted(shard_of[:cut], key=[one, two].index)  # and is mixed
    assert len({tuple(order) for order in orders}) == 5
    assert (shuffled(sizes, 0, 1, 2) == orders[1]).all()
    assert (shuffled(sizes, 1, 1, 2) != orders[1]).any()


def test_global_batches_do_not_depend_on_ranks():
    def order(epoch):
        return shuffled([10, 9, 7], 0, epoch, 2)

    def batches(batch_size, world):
        ranks = [list(TrainSampler(range(26), order, batch_size, world, rank)) for rank in range(world)]
        assert len({len(tickets) for tickets in ranks}) == 1
        return [
            [ticket for tickets in ranks for ticket in tickets[start : start + batch_size]]
            for start in range(0, len(ranks[0]), batch_size)
        ]

    assert batches(8, 1) == batches(4, 2) == batches(2, 4)
    assert TrainSampler(range(26), order, 4, 2, 0, accumulate=2).batches == 2  # no step of three parts


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_validation_has_every_sample_once_on_any_number_of_ranks(world):
    ranks = [list(EvalSampler(range(26), world, rank)) for rank in range(world)]
    assert len({len(tickets) for tickets in ranks}) == 1
    assert sorted(t.index for tickets in ranks for t in tickets if t.valid) == list(range(26))
