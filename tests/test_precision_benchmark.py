"""benchmarks/precision.py: TF32 by its definition, and that its figures are those of models rounded by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_pipeline
from torch import nn

from benchmarks.precision import TF32, compare, round_to_tf32


def test_rounding_keeps_ten_bits_of_mantissa():
    step = 2.0**-10
    x = torch.tensor([1, 1 + step, 1 + step / 2, 1 + 3 * step / 2, 1 + 0.51 * step, -3 - 1.9 * step, 0.1, 2.0**-20])
    expected = [1, 1 + step, 1, 1 + 2 * step, 1 + step, -3 - 2 * step, 1638 / 16384, 2.0**-20]
    assert round_to_tf32(x).tolist() == expected
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mantissa, exponent = np.frexp(values.double().numpy())
    by_numpy = np.ldexp(np.round(mantissa * 2.0**11), exponent - 11)
    assert np.array_equal(round_to_tf32(values).double().numpy(), by_numpy)
    assert round_to_tf32(values.bfloat16()).dtype == torch.bfloat16


def test_factors_are_rounded_and_what_is_added_is_not():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(4, 16)
    factors = (round_to_tf32(x).double() @ round_to_tf32(layer.weight).double().T).float()
    with TF32(), torch.no_grad():
        assert torch.allclose(layer(x), factors + layer.bias, rtol=0, atol=1e-6)
        assert torch.allclose(x @ layer.weight.T, factors, rtol=0, atol=1e-6)
        assert not torch.allclose(x @ layer.weight.T, F.linear(x.double(), layer.weight.double()).float(), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_torchs_where_rounding_changes_little(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    mask = None if causal else torch.rand(5, 5).lt(0.7) | torch.eye(5, dtype=torch.bool)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with TF32():
        rounded = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    error = (rounded - exact).abs().max()
    assert 1e-5 < error < 3e-3


def test_figures():
    pipe = make_pipeline()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = compare(pipe, images, torch.tensor([0, 1, 2]))
    half = make_pipeline().to(torch.bfloat16).tokenizer.tokenize(images)
    agree = (half == make_pipeline().tokenizer.tokenize(images)).double().mean().item()
    assert found["bfloat16"]["codes_agree"] == agree
    for name in ("logits_error", "pixels_error"):
        assert 0 < found["tf32"][name] < found["bfloat16"][name] < 0.1
    assert all(0 < found[name]["pixels_of_8_bits_agree"] <= 1 for name in found)
