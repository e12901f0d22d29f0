"""Training of a language model of transformers: resume, checkpoints; strategies that refuse it."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import AR, CLASSES, TOKENS, make_ar, write_tokens
from tiny_training import STILL, token_data, trainer

from dar_lightning import ARConfig
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.training import ARModule, FSDP2Strategy
from dar_lightning.training.callbacks import EMA
from dar_lightning.weights.lightning import load_lightning_checkpoint

pytest.importorskip("transformers")
CONFIG = AR | dict(residual_dropout=0.0, ffn_dropout=0.0, backbone="transformers")


def config(**options) -> ARConfig:
    return ARConfig(**CONFIG, backbone_options={"model_type": "qwen3", "attention_dropout": 0.1} | options)


def module(**options) -> ARModule:
    torch.manual_seed(0)
    return ARModule(config(**options))


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, options):
    """Weights, their average and the optimizer, to the bit; the checkpoint alone draws."""
    if options:
        pytest.importorskip("peft")
    tokens = write_tokens(tmp_path / "tokens", 8)
    for name, steps, ckpt in (("whole", 4, None), ("half", 2, None), ("rest", 4, "half")):
        saving = ModelCheckpoint(tmp_path, name, every_n_train_steps=steps)
        fit = trainer(EMA(0.8), saving, max_steps=steps, enable_checkpointing=True, limit_val_batches=0)
        started = module(**options)
        fit.fit(started, token_data((tokens, tokens)), ckpt_path=tmp_path / f"{ckpt}.ckpt" if ckpt else None)
    whole, rest = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "rest"))
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, rest[key][name]) for name, tensor in whole[key].items())
    first, again = (each["optimizer_states"][0]["state"][0] for each in (whole, rest))
    assert all(torch.equal(first[name], again[name]) for name in first)

    for weights in ("ema", "raw"):
        ar = load_lightning_checkpoint(tmp_path / "whole.ckpt", weights)
        assert ar.config.backbone_options == {"model_type": "qwen3", "attention_dropout": 0.1}
        saved = whole["state_dict" if weights == "ema" else "current_model_state"]
        assert torch.equal(ar.head.weight, saved["ar.head.weight"])
        name = "backbone.trunk.layers.0.self_attn.q_proj.weight"
        before, after = module(**options).ar.state_dict()[name], saved[f"ar.{name}"]
        assert torch.equal(before, after) == bool(options)  # frozen under adapters
        assert torch.equal(ar.state_dict()[name], after) != bool(options)  # merged
        assert generate(ar, torch.arange(len(CLASSES)), guidance=2.0).shape == (len(CLASSES), TOKENS)


def test_what_refuses_it():
    trains = SimpleNamespace(ar=make_ar(**CONFIG, backbone_options={"model_type": "llama"}), trainer=None)
    with pytest.raises(
        UserError, match=r"trainer\.strategy: FSDP2Strategy shards our Llama, backbone is 'transformers'"
    ):
        FSDP2Strategy.configure_ddp(SimpleNamespace(lightning_module=trains))
    names = {name.removeprefix("ar.") for name in module()._ddp_params_and_buffers_to_ignore}
    assert names >= {"order", "backbone.trunk.rotary_emb.inv_freq"}
    assert {name for name, _ in module().ar.named_buffers()} <= names
    still = ARModule(ARConfig(**CONFIG | STILL, backbone_options={"model_type": "llama"}))
    assert not [each for each in still.modules() if isinstance(each, torch.nn.Dropout) and each.p]
