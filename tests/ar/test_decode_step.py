"""The decoding step of static shapes draws what the model draws, is one graph, and asks the host for nothing."""

import pytest
import torch
from tiny_models import make_ar, seeds

from dar_lightning.ar.sampling import generate

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
}


@pytest.fixture(scope="module", params=MODELS)
def ar(request):
    return make_ar(**MODELS[request.param])


@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_the_model_draws(ar, case):
    if "prefix" in CASES[case] and ar.config.order != "coarse_to_fine":
        pytest.skip("no order but the tokenizer's begins with its first tokens")
    options = CASES[case] | {"generator": seeds(4, 5, 6)}
    expected = generate(ar, LABELS, static=False, **options)
    for _ in range(2):  # the second drawing finds a step that is not new
        assert torch.equal(generate(ar, LABELS, static=True, **CASES[case] | {"generator": seeds(4, 5, 6)}), expected)
