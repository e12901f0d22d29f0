"""The hash behind drawn tokens, against integers of Python, and its statistics against those of true randomness."""

import pytest
import torch
from scipy import stats

from dar_lightning.ar import gumbel
from dar_lightning.ar.gumbel import draw_keys, exponentials


def keys(count: int, num_tokens: int, *seeds: int) -> torch.Tensor:
    """Of one generator, or of one per sequence."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return draw_keys(count, num_tokens, generators if len(seeds) > 1 else generators[0], torch.device("cpu"))


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_hash_is_the_published_one():
    drawn = keys(3, 2, 5, 6, 7)[:, 1]
    assert torch.equal(drawn[1:2], keys(1, 2, 6)[:, 1]), "a row is its own generator's"
    assert len(drawn.unique()) == 6
    found = exponentials(drawn, 100)
    for row, (first, second) in enumerate(drawn.tolist()):
        words = [lowbias32(lowbias32(code ^ first % 2**32) ^ second % 2**32) for code in range(100)]
        uniforms = (torch.tensor([word >> 1 for word in words], dtype=torch.float64) + 0.5) / 2**31
        assert torch.allclose(found[row].double(), -torch.log1p(-uniforms), rtol=1e-5)


def test_they_are_exponential_and_in_range():
    sample = exponentials(keys(64, 1, 0)[:, 0], 16384).double().flatten()
    assert stats.kstest(sample.numpy(), "expon").pvalue > 1e-3
    assert 0 < sample.min() < 1e-5
    assert sample.max() < 17


@pytest.mark.parametrize("word", [0, -1])
def test_the_largest_word_is_finite(word, monkeypatch):
    """float32 would make 1 of it, and infinity of that: a code with all the probability would lose."""
    monkeypatch.setattr(gumbel, "_mix_", lambda words: torch.full_like(words, word))
    assert 0 < exponentials(torch.zeros(1, 2, dtype=torch.int32), 1).item() < 17


@pytest.mark.parametrize("neighbours", ["codes", "positions", "keys"])
def test_neighbours_are_independent(neighbours):
    if neighbours == "codes":
        field = exponentials(keys(1, 1, 0)[:, 0], 2**18)[0]
        pairs = field[:-1], field[1:]
    elif neighbours == "positions":
        field = exponentials(keys(1, 256, 0)[0], 1024)
        pairs = field[:-1].flatten(), field[1:].flatten()
    else:  # that differ by one bit, in either half; the lowest of the first one permute the codes
        drawn = keys(1, 52, 0)[0]
        flips = torch.zeros(52, 2, dtype=torch.int32)
        flips[torch.arange(52), (torch.arange(52) >= 20).int()] = 1 << torch.tensor([*range(12, 32), *range(32)]).int()
        pairs = exponentials(drawn, 4096).flatten(), exponentials(drawn ^ flips, 4096).flatten()
    uniforms = [1 - torch.exp(-side.double()) for side in pairs]
    table = torch.histogramdd(torch.stack(uniforms, 1), [16, 16], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-3
