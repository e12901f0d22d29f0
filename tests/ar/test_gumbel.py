"""The hash behind drawn tokens, against integers of Python, and its statistics against those of true randomness."""

import pytest
import torch
from scipy import stats

from dar_lightning.ar import gumbel
from dar_lightning.ar.gumbel import draw_keys, exponentials

CPU = torch.device("cpu")


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_hash_is_the_published_one():
    keys = draw_keys(3, 2, seeds(5, 6, 7), CPU)[:, 1]
    found = exponentials(keys, 100)
    for row, (first, second) in enumerate(keys.tolist()):
        words = [lowbias32(lowbias32(code ^ first % 2**32) ^ second % 2**32) for code in range(100)]
        uniforms = (torch.tensor([word >> 1 for word in words], dtype=torch.float64) + 0.5) / 2**31
        assert torch.allclose(found[row].double(), -torch.log1p(-uniforms), rtol=1e-5)


def test_a_row_is_its_own_generators():
    batch = draw_keys(3, 8, seeds(1, 2, 3), CPU)
    assert torch.equal(batch[1:2], draw_keys(1, 8, seeds(2), CPU))
    assert len(batch.unique()) == 48


def test_they_are_exponential_and_in_range():
    sample = exponentials(draw_keys(64, 1, seeds(0)[0], CPU)[:, 0], 16384).double().flatten()
    assert stats.kstest(sample.numpy(), "expon").pvalue > 1e-3
    assert 0 < sample.min() < 1e-5
    assert sample.max() < 17


def test_the_largest_word_is_finite(monkeypatch):
    """float32 would make 1 of it, and infinity of that: a code with all the probability would lose."""
    for word in (0, -1):
        monkeypatch.setattr(gumbel, "_mix_", lambda words, word=word: torch.full_like(words, word))
        assert 0 < exponentials(torch.zeros(1, 2, dtype=torch.int32), 1).item() < 17


@pytest.mark.parametrize("neighbours", ["codes", "positions", "keys"])
def test_neighbours_are_independent(neighbours):
    if neighbours == "codes":
        field = exponentials(draw_keys(1, 1, seeds(0)[0], CPU)[:, 0], 2**18)[0]
        pairs = field[:-1], field[1:]
    elif neighbours == "positions":
        field = exponentials(draw_keys(1, 256, seeds(0)[0], CPU)[0], 1024)
        pairs = field[:-1].flatten(), field[1:].flatten()
    else:  # that differ by one bit, in either half; the lowest of the first one permute the codes
        keys = draw_keys(1, 52, seeds(0)[0], CPU)[0]
        flips = torch.zeros(52, 2, dtype=torch.int32)
        flips[torch.arange(52), (torch.arange(52) >= 20).int()] = 1 << torch.tensor([*range(12, 32), *range(32)]).int()
        others = keys ^ flips
        assert (others != keys).sum() == 52
        pairs = exponentials(keys, 4096).flatten(), exponentials(others, 4096).flatten()
    uniforms = [1 - torch.exp(-side.double()) for side in pairs]
    table = torch.histogramdd(torch.stack(uniforms, 1), [16, 16], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-3


def test_winners_are_spread_evenly():
    """Over many positions each of 64 equally likely codes wins equally often, and the next winner tells nothing."""
    winners = exponentials(draw_keys(1, 65536, seeds(3)[0], CPU)[0], 64).argmin(1)
    assert stats.chisquare(torch.bincount(winners, minlength=64).numpy()).pvalue > 1e-3
    pairs = torch.bincount(winners[:-1] * 64 + winners[1:], minlength=4096)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3
