"""Packed weights give what plain ones give, wherever packing is possible, and are not used where it is not."""

import copy
import platform

import pytest
import torch
from torch import nn

from dar_lightning.ar import sampling
from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.ar.onednn import PackedLinear, packed
from dar_lightning.layers import compile_blocks

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"), reason="made for x86"
)
LABELS = torch.tensor([0, 3, 4])


def awake(model: nn.Module) -> nn.Module:
    """With random weights everywhere, also where training starts from zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture
def ar() -> ARModel:
    return awake(ARModel(ARConfig.preset("tiny", num_classes=5, vocab_size=24, num_tokens=12)))


class Other(nn.Linear):
    """Computes something else, as an adapter does."""


def plain(module: nn.Module, rows: int) -> nn.Module:
    """In place of `packed`."""
    return module


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_packed_layer_is_the_product_in_float64(rows, dtype, tolerance):
    """Also for inputs of other sizes than it was packed for."""
    torch.manual_seed(0)
    weight, x = torch.randn(80, 48).to(dtype), torch.randn(rows, 3, 48).to(dtype)
    result = PackedLinear(weight, rows=8)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)


def test_the_copy_shares_what_is_not_packed_and_leaves_the_model_alone(ar):
    before = {name: tensor.clone() for name, tensor in ar.state_dict().items()}
    fast = packed(ar, rows=8)
    assert fast.token_embedding.weight is ar.token_embedding.weight
    assert fast.rotary is ar.rotary
    assert not any(isinstance(layer, nn.Linear) for layer in fast.modules())
    assert not any(isinstance(layer, PackedLinear) for layer in ar.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ar.state_dict().items())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tokens_are_those_of_plain_weights(ar, guidance, monkeypatch):
    def draw(labels):
        return sampling.generate(ar, labels, guidance=guidance, generator=torch.Generator().manual_seed(0))

    fast = draw(LABELS)
    monkeypatch.setattr(sampling, "packed", plain)
    assert torch.equal(fast, draw(LABELS))


def test_each_call_reads_the_weights_of_its_time(ar):
    options = {"generator": torch.Generator().manual_seed(0)}
    sampling.generate(ar, LABELS, **options)
    with torch.no_grad():
        ar.head.weight.mul_(-3)
    changed = sampling.generate(ar, LABELS, generator=torch.Generator().manual_seed(0))
    fresh = sampling.generate(copy.deepcopy(ar), LABELS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(changed, fresh)


def test_a_model_of_compiled_blocks_is_packed(ar):
    """Its copy is not compiled: a graph would take the weights for inputs, which packed ones cannot be."""
    expected = sampling.generate(ar, LABELS, generator=torch.Generator().manual_seed(0))
    compile_blocks(ar)
    assert torch.equal(sampling.generate(ar, LABELS, generator=torch.Generator().manual_seed(0)), expected)


def test_where_nothing_is_gained_the_model_itself_is_used(ar):
    assert packed(ar, rows=1) is ar
    assert packed(ar.to("meta"), rows=8) is ar
    half = ARModel(ar.config).half()
    assert packed(half, rows=8) is half
    full = ARModel(ar.config)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(full, rows=8) is full
    with torch.backends.mkldnn.flags(enabled=False):
        assert packed(full, rows=8) is full
    assert packed(full, rows=8) is not full
    full.blocks[0].ffn.up = Other(32, full.config.ffn_dim, bias=False)
    assert packed(full, rows=8) is full
