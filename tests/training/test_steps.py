"""What a training step computes, against the same by hand; a language model as the AR model, resumed to the bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from refusals import refused
from tiny_models import AR, CLASSES, CODES, SIZE, TOKENIZER, TOKENS, make_ar, make_tokenizer, random_codes, write_tokens
from tiny_training import STILL, ar_module, image_data, token_data, tokenizer_module, trainer
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.ar.sampling import generate
from dar_lightning.errors import UserError
from dar_lightning.training import ARModule, FSDP2Strategy, TokenizerModule
from dar_lightning.training.callbacks import EMA, CodebookWarmup, EarlyStoppingPatience
from dar_lightning.training.flops import step_flops
from dar_lightning.training.module import seed_batch
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import load_lightning_checkpoint


class Outputs(Callback):
    """Keeps what callbacks are given of the last step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.outputs = outputs


def first_step(module: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """The losses that it logs; and what callbacks are given of it has no graph."""
    seen = Outputs()
    run = trainer(seen, max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=data)
    tensors = [leaf for leaf in tree_leaves(seen.outputs) if leaf is not None]
    assert tensors
    assert not any(tensor.requires_grad for tensor in tensors)
    return {name.removeprefix("train/"): float(value) for name, value in run.logged_metrics.items()}


def test_the_tokenizer_trains_on_its_losses(images):
    batch = next(iter(image_data(images).train_dataloader()))
    module = tokenizer_module()
    tokenizer = copy.deepcopy(module.tokenizer)
    logged = first_step(module, image_data(images))
    seed_batch(rank=0, batch=0)
    u = torch.rand(4)
    noise = torch.randn(4, 3, SIZE, SIZE)
    losses = tokenizer.train().training_losses(batch["image"] / 127.5 - 1, u, noise)
    expected = {name: float(losses[name].detach()) for name in ("flow", "vq", "commit")}
    assert logged == pytest.approx(expected | {"loss": sum(expected.values())}, rel=1e-5)


def test_the_ar_model_trains_on_cross_entropy_with_dropout(tokens):
    batch = next(iter(token_data(tokens).train_dataloader()))
    module = ar_module({"class_dropout": 0.5})
    ar = copy.deepcopy(module.ar)
    logged = first_step(module, token_data(tokens))
    seed_batch(rank=0, batch=0)
    log_p = ar.train()(batch["label"], batch["codes"]).log_softmax(-1)
    by_hand = -log_p.gather(2, batch["codes"][..., None]).mean()
    without_dropout = F.cross_entropy(ar.eval()(batch["label"], batch["codes"]).transpose(1, 2), batch["codes"])
    assert logged == {"loss": pytest.approx(float(by_hand), rel=1e-5)}
    assert abs(float(without_dropout) - float(by_hand)) > 1e-4


def test_ranks_batches_and_runs_draw_differently(monkeypatch):
    draws = set()
    for run in ("0", "1", "7"):
        monkeypatch.setenv("PL_GLOBAL_SEED", run)
        for rank in range(8):
            for batch in range(50):
                seed_batch(rank, batch)
                draws.add(float(torch.rand((), dtype=torch.float64)))
    assert len(draws) == 3 * 8 * 50


def test_four_sequences_are_learnt_by_heart():
    codes = torch.from_numpy(random_codes(4))
    torch.manual_seed(0)
    module = ARModule(ARConfig(**AR | STILL), OptimizerConfig(lr=1e-2))
    samples = [{"label": torch.tensor(i), "codes": codes[i]} for i in range(4)]
    run = trainer(max_epochs=60)
    run.fit(module, DataLoader(samples, batch_size=4))
    assert float(run.logged_metrics["train/loss"]) < 0.05
    assert torch.equal(generate(module.ar, torch.arange(4), top_k=1), codes)


MAKE = [(tokenizer_module, image_data, "images"), (ar_module, token_data, "tokens")]


@pytest.mark.parametrize(("module", "data", "shards"), MAKE)
def test_validation_counts_each_sample_once_and_testing_too(module, data, shards, request):
    """Seven sequences in batches of four."""
    module, data = module(), data(request.getfixturevalue(shards))
    logged = trainer().validate(module, data, verbose=False)[0]
    tested = trainer().test(module, data, verbose=False)[0]
    assert tested == {name.replace("val/", "test/"): value for name, value in logged.items()}
    if shards == "tokens":
        everything = next(iter(token_data(request.getfixturevalue(shards), 7).val_dataloader()))
        logits = module.ar.eval()(everything["label"], everything["codes"])
        loss = F.cross_entropy(logits.transpose(1, 2), everything["codes"])
        hits = (logits.argmax(-1) == everything["codes"]).float()
        assert logged == pytest.approx({"val/loss": float(loss), "val/accuracy": float(hits.mean())}, rel=1e-5)


def caught(module: LightningModule, batch: dict) -> dict[str, float]:
    """What a validation step logs."""
    found = {}
    module.log_dict = lambda values, batch_size=None, **_: found.update(values | {"batch_size": batch_size})
    with torch.no_grad():
        module.eval().validation_step(batch, 3)
    return {name: float(value) for name, value in found.items()}


VALID = torch.tensor([True, True, False, True, False])
PIXELS = torch.randint(256, (5, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SEQUENCES = {"codes": torch.from_numpy(random_codes(5)), "label": torch.tensor([0, 1, 2, 3, 0])}


def test_validation_does_not_see_padding():
    module = tokenizer_module()
    found = caught(module, {"image": PIXELS, "valid": VALID})
    used = module.codebook_use.compute()
    module.codebook_use.reset()
    other = torch.where(VALID[:, None, None, None], PIXELS, 255 - PIXELS)
    assert found == caught(module, {"image": other, "valid": VALID})
    assert found["batch_size"] == 3
    assert module.codebook_use.compute() == used
    codes = module.tokenizer.tokenize(PIXELS[VALID] / 127.5 - 1)
    assert float(used[0]) == pytest.approx(len(codes.unique()) / CODES)

    module = ar_module()
    kept = {name: values[VALID] for name, values in SEQUENCES.items()}
    kept = caught(module, kept | {"valid": VALID[VALID]})
    assert caught(module, SEQUENCES | {"valid": VALID}) == pytest.approx(kept, rel=1e-5)
    assert caught(module, SEQUENCES | {"valid": ~VALID}) != pytest.approx(kept, rel=1e-3)


def test_a_batch_of_padding_alone_weighs_nothing():
    tokenizer = tokenizer_module()
    for module, batch in ((tokenizer, {"image": PIXELS}), (ar_module(), SEQUENCES)):
        found = caught(module, batch | {"valid": torch.zeros(5, dtype=torch.bool)})
        assert found.pop("batch_size") == 0
        assert torch.tensor(list(found.values())).isfinite().all()
    assert int(tokenizer.codebook_use.counts.sum()) == 0


def test_every_trained_parameter_gets_a_gradient():
    module = TokenizerModule(TokenizerConfig(**TOKENIZER | {"repa_layer": 0}))
    assert not any(parameter.requires_grad for parameter in module.tokenizer.decoder.repa_head.parameters())
    module.training_step({"image": PIXELS}, 0)["loss"].backward()
    assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("module", "data", "shards"), MAKE)
def test_load_from_checkpoint_needs_nothing_else(module, data, shards, request, tmp_path):
    module, run = module(), trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, data(request.getfixturevalue(shards)))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    ours, theirs = module.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert again.hparams == module.hparams


def test_nothing_to_start_from(tmp_path):
    make_ar().save_pretrained(tmp_path / "ar")
    other = ARConfig(**AR | {"dim": 64, "vocab_size": CODES + 1, "num_classes": 9})
    refused("no tensor there fits", ARModule, other, init_from=str(tmp_path / "ar"))
    refused("not a folder", lambda: ARModule(ARConfig(**AR), init_from=str(tmp_path / "no" / "such" / "folder")))


@pytest.fixture
def frozen(images, tmp_path):
    """A tokenizer whose latent_norm has seen images, its config with a finer decoder, and the same of others."""
    source = make_tokenizer(5, latent_norm="batch")
    data = image_data(images)
    source.train().training_losses(next(iter(data.train_dataloader()))["image"] / 127.5 - 1)
    source.eval().save_pretrained(tmp_path / "source")

    def make(freeze_encoder: bool = True, **changes) -> TokenizerModule:
        config = TokenizerConfig(**TOKENIZER | {"latent_norm": "batch", "decoder_patch_size": 4} | changes)
        return TokenizerModule(config, init_from=str(tmp_path / "source"), freeze_encoder=freeze_encoder)

    return source, data, make


def test_a_finer_decoder_learns_on_frozen_tokens(frozen):
    """Encoder and codebook stay bit for bit, in the average too; the rest learns."""
    source, data, make = frozen
    module = make().train()
    before = copy.deepcopy(module.tokenizer.state_dict())
    batch = next(iter(data.train_dataloader()))
    assert step_flops(module, batch) < step_flops(make(False), batch), "frozen parts cost no backward pass"
    trainer(EMA(0.5), max_steps=4, limit_val_batches=1, val_check_interval=1).fit(module, datamodule=data)
    after = module.tokenizer.state_dict()
    assert {name.split(".")[0] for name in after if (after[name] != before[name]).any()} == {"conditioner", "decoder"}
    batch = next(iter(data.val_dataloader()))["image"] / 127.5 - 1
    assert torch.equal(module.tokenizer.tokenize(batch), source.tokenize(batch))


def test_what_would_change_frozen_tokens_is_refused(frozen):
    _, data, make = frozen
    for changes in ({"codebook_size": 2 * CODES}, {"absolute_positions": True}, {"latent_norm": "none"}):
        (name,) = changes
        refused(rf"freeze_encoder: config\.{name} is {changes[name]!r}, and .*/source", make, **changes)
    make(freeze_encoder=False, codebook_size=2 * CODES)
    refused(
        "freeze_encoder is set and init_from is null",
        lambda: TokenizerModule(TokenizerConfig(**TOKENIZER), freeze_encoder=True),
    )
    with pytest.raises(UserError, match="CodebookWarmup moves codes, which freeze_encoder keeps"):
        trainer(CodebookWarmup(1, 1), max_steps=1).fit(make(), datamodule=data)


@pytest.mark.parametrize("was", [True, False])
def test_a_run_stays_frozen_or_not(frozen, tmp_path, was):
    _, data, make = frozen
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(make(was), datamodule=data)
    run.save_checkpoint(tmp_path / "x.ckpt")
    there = dict(datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(UserError, match=f"freeze_encoder is {not was}, and was {was} in the run of the checkpoint"):
        trainer(max_steps=2).fit(make(not was), **there)
    again = trainer(max_steps=2, limit_val_batches=0)
    again.fit(make(was), **there)
    assert again.global_step == 2
    trainer(limit_val_batches=1).validate(make(not was), **there)


CONFIG = AR | dict(residual_dropout=0.0, ffn_dropout=0.0, backbone="transformers")


def config(**options) -> ARConfig:
    pytest.importorskip("transformers")
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
    pytest.importorskip("transformers")
    trains = SimpleNamespace(ar=make_ar(**CONFIG, backbone_options={"model_type": "llama"}), trainer=None)
    line = r"trainer\.strategy: FSDP2Strategy shards our Llama, backbone is 'transformers'"
    refused(line, FSDP2Strategy.configure_ddp, SimpleNamespace(lightning_module=trains))
    names = {name.removeprefix("ar.") for name in module()._ddp_params_and_buffers_to_ignore}
    assert names >= {"order", "backbone.trunk.rotary_emb.inv_freq"}
    assert {name for name, _ in module().ar.named_buffers()} <= names
    still = ARModule(ARConfig(**CONFIG | STILL, backbone_options={"model_type": "llama"}))
    assert not [each for each in still.modules() if isinstance(each, torch.nn.Dropout) and each.p]


OWN_PIXELS = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (OWN_PIXELS / 255, "float32 from 0 to 1: give uint8, or floats from 0 to 255"),
        (OWN_PIXELS / 127.5 - 1, "float32 from -1 to 1: give uint8"),
        (OWN_PIXELS.double() / 255, "float64 from 0 to 1"),
        (OWN_PIXELS[..., :-8], rf"is \(2, 3, {SIZE}, {SIZE - 8}\): need \(B, 3, {SIZE}, {SIZE}\)"),
        (OWN_PIXELS[:, :1], r"is \(2, 1, .*need \(B, 3, "),
        (OWN_PIXELS.permute(0, 2, 3, 1), "need"),
    ],
)
def test_pixels_that_would_be_misread(pixels, says):
    module = tokenizer_module()
    refused(says, module.training_step, {"image": pixels}, 0)
    refused(says, module.evaluate_batch, {"image": pixels, "valid": torch.ones(2, dtype=torch.bool)}, 0, "val")


def test_floats_of_the_range_of_uint8():
    module = tokenizer_module()
    assert torch.equal(module.read_images(OWN_PIXELS.float(), 0), module.read_images(OWN_PIXELS, 0))
    assert torch.equal(module.read_images(OWN_PIXELS, 0), OWN_PIXELS.float() / 127.5 - 1)


def test_patience_is_the_one_of_the_config():
    """Lightning's EarlyStopping takes it from the checkpoint."""
    early, other = EarlyStopping("val/loss", patience=7), EarlyStopping("val/flow", patience=3)
    run = trainer(early, other, EarlyStoppingPatience())
    states = {each.state_key: EarlyStopping(each.monitor, patience=3).state_dict() for each in (early, other)}
    states[early.state_key]["wait_count"] = 2
    EarlyStoppingPatience().on_load_checkpoint(run, None, {"callbacks": states})
    for each in (early, other):
        each.load_state_dict(states[each.state_key])
    assert (early.patience, early.wait_count, other.patience) == (7, 2, 3)
