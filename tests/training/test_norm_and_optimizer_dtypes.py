"""Norms and optimizer steps under bf16-mixed, by CUDA's rules on tensors without data, and as sharded."""

import pytest
import torch
import torch.nn.functional as F
from test_precision_rules import BF16, F32, Trace, fake_cuda, mesh, on_fake_cuda, token_batch  # noqa: F401  (a fixture)
from tiny_models import AR
from torch import nn

from dar_lightning.ar.config import ARConfig
from dar_lightning.ar.model import ARModel
from dar_lightning.training import ARModule
from dar_lightning.training.fsdp import mixed_precision, shard
from dar_lightning.training.optim import OptimizerConfig, configure_adamw


def test_norms_of_the_ar_model_are_float32():
    """So are their results: the residual stream is float32, and products cast what they read themselves."""
    with fake_cuda():
        module = on_fake_cuda(ARModule(ARConfig(**AR))).train()
        seen = []
        for layer in module.modules():
            if isinstance(layer, nn.RMSNorm):
                layer.register_forward_hook(lambda _, given, result: seen.append((given[0].dtype, result.dtype)))
        with Trace() as trace:
            module.training_step(token_batch(), 0)
    assert seen == [(F32, F32)] * (2 * AR["depth"] + 1)
    assert trace.dtypes("rms_norm", "_fused_rms_norm", "pow", "rsqrt", "mean") == {F32}
    assert BF16 in trace.dtypes("mm"), "autocast is on"


def traced_step(model: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Dtypes that AdamW's update takes, and those of its state."""
    optimizer = configure_adamw(model, OptimizerConfig(lr=1e-3), 10)["optimizer"]
    with Trace() as trace:
        optimizer.step()
    return trace.dtypes("_fused_adamw_"), {
        value.dtype for state in optimizer.state.values() for value in state.values()
    }


def test_adamw_is_float32_on_one_gpu():
    with fake_cuda():
        module = on_fake_cuda(ARModule(ARConfig(**AR))).train()
        module.training_step(token_batch(), 0)
        for parameter in module.parameters():  # what autograd gives a parameter has its dtype
            parameter.grad = torch.empty_like(parameter)
        assert traced_step(module) == ({F32}, {F32})


@pytest.mark.filterwarnings("ignore")
def test_adamw_is_float32_on_slices(mesh):  # noqa: F811
    """The blocks' matrices are gathered as bfloat16; slices, gradients and moments stay float32."""
    model, batch = ARModel(ARConfig(**AR)).train(), token_batch()
    shard(model, mesh, mixed_precision())
    with torch.autocast("cpu", BF16), Trace() as trace:
        logits = model(batch["label"], batch["codes"])
        F.cross_entropy(logits.flatten(0, 1), batch["codes"].flatten()).backward()
    assert BF16 in trace.dtypes("mm")
    assert {parameter.grad.dtype for parameter in model.parameters()} == {F32}
    assert traced_step(model) == ({F32}, {F32})
