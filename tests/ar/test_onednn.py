"""Packed weights give what plain ones give, wherever packing is possible, and are not used where it is not."""

import platform
from pathlib import Path

import pytest
import torch
from tiny_models import make_ar
from torch import nn

from dar_lightning.ar import sampling
from dar_lightning.ar.onednn import PackedLinear, packed
from dar_lightning.layers import compile_blocks

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"), reason="made for x86"
)
LABELS = torch.tensor([0, 3, 1])


def generate(ar: nn.Module, guidance: float = 3.0) -> torch.Tensor:
    return sampling.generate(ar, LABELS, guidance=guidance, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_packed_layer_is_the_product_in_float64(rows, dtype, tolerance):
    """Also for inputs of other sizes than it was packed for."""
    torch.manual_seed(0)
    weight, x = torch.randn(80, 48).to(dtype), torch.randn(rows, 3, 48).to(dtype)
    result = PackedLinear(weight, rows=8)(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), x.double() @ weight.double().T, rtol=tolerance, atol=tolerance)


def test_the_copy_shares_what_is_not_packed_and_leaves_the_model_alone():
    ar = make_ar()
    before = {name: tensor.clone() for name, tensor in ar.state_dict().items()}
    fast = packed(ar, rows=8)
    assert fast.token_embedding.weight is ar.token_embedding.weight
    assert fast.rotary is ar.rotary
    assert not any(isinstance(layer, nn.Linear) for layer in fast.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ar.state_dict().items())


def test_tokens_are_those_of_plain_weights(monkeypatch):
    """At each call anew; also of compiled blocks, whose graph would take the weights for inputs: not in the copy."""
    ar = make_ar()
    fast, unguided = generate(ar), generate(ar, guidance=1.0)
    with torch.no_grad():
        ar.head.weight.mul_(-3)
    changed = generate(ar)
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given: compiler(*given, backend="eager"))
    compile_blocks(ar)
    assert torch.equal(generate(ar), changed)

    monkeypatch.setattr(sampling, "packed", lambda module, rows: module)
    plain = make_ar()
    assert torch.equal(fast, generate(plain))
    assert torch.equal(unguided, generate(plain, guidance=1.0))
    with torch.no_grad():
        plain.head.weight.mul_(-3)
    assert torch.equal(changed, generate(plain))


def test_where_nothing_is_gained_the_model_itself_is_used():
    """MKL is Intel's: there, two and three rows are read as fast as one."""
    full, half, meta = make_ar(), make_ar().half(), make_ar().to("meta")
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert [packed(full, rows) is full for rows in (1, 2, 3, 4)] == [True, intel, intel, False]
    assert all(packed(ar, rows) is ar for ar, rows in ((full, 1), (meta, 8), (half, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(full, rows=8) is full
    with torch.backends.mkldnn.flags(enabled=False):
        assert packed(full, rows=8) is full
    assert packed(full, rows=8) is not full
    adapter = type("Adapter", (nn.Linear,), {})  # a subclass may compute something else
    full.blocks[0].ffn.up = adapter(32, full.config.ffn_dim, bias=False)
    assert packed(full, rows=8) is full
