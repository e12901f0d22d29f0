"""benchmarks/precision.py: TF32 by its definition, and that its figures are those of models rounded by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_pipeline
from torch import Tensor, nn

from benchmarks.precision import TF32, compare, round_to_tf32
from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer


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


@pytest.fixture
def allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("product", [F.linear, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__])
def test_factors_are_rounded_and_what_is_added_is_not(product):
    generator = torch.Generator().manual_seed(0)
    shapes = {F.linear: ((4, 16), (8, 16)), F.conv2d: ((2, 3, 8, 8), (5, 3, 4, 4)), torch.bmm: ((2, 3, 4), (2, 4, 5))}
    x, weight = (torch.randn(shape, generator=generator) for shape in shapes.get(product, ((3, 4), (4, 5))))
    bias = [torch.randn(len(weight), generator=generator)] if product in (F.linear, F.conv2d) else []
    rounded = [round_to_tf32(factor).double() for factor in (x, weight)]
    expected = product(*rounded, *(each.double() for each in bias)).float()
    with TF32():
        found = product(x, weight, *bias)
        torch.set_float32_matmul_precision("highest")
        unchanged = product(x, weight, *bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    assert (found - unchanged).abs().max() > 1e-4, "rounding shows"
    assert torch.equal(unchanged, product(x, weight, *bias)), "without permission nothing is rounded"


@pytest.mark.usefixtures("allowed")
def test_a_layer_is_caught_and_attention_and_the_search_for_codes_left_exact():
    torch.manual_seed(0)
    layer, x, (q, k, v) = nn.Linear(16, 8), torch.randn(4, 16), torch.randn(3, 2, 4, 5, 8)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    quantizer, latents = VectorQuantizer(1024, 8), torch.randn(32, 256, 8)
    quantizer.codebook.data = F.normalize(torch.randn(1024, 8), dim=-1)
    products = F.normalize(latents.double(), dim=-1) @ quantizer.codebook.double().T
    with TF32(), torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), exact)
        rounded = (F.normalize(latents, dim=-1) @ quantizer.codebook.T).argmax(dim=-1)
        found = quantizer.nearest(latents)
    assert not torch.equal(layer(x), F.linear(round_to_tf32(x), round_to_tf32(layer.weight), layer.bias))
    assert (rounded != products.argmax(dim=-1)).sum() > 10
    assert (found != products.argmax(dim=-1)).sum() <= 1, "two codes may be equally near"


def test_figures():
    pipe = make_pipeline()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = compare(pipe, images, torch.tensor([0, 1, 2]))
    assert (found["images"], found["weights_stored_in"]) == (3, "float32")
    half = make_pipeline().to(torch.bfloat16).tokenizer.tokenize(images)
    agree = (half == make_pipeline().tokenizer.tokenize(images)).double().mean().item()
    assert found["bfloat16"]["codes_agree"] == agree
    for name in ("logits_error", "pixels_error"):
        assert 0 < found["tf32"][name] < found["bfloat16"][name] < 0.1
    assert all(0 < found[name]["pixels_of_8_bits_agree"] <= 1 for name in ("tf32", "bfloat16"))
