"""Switches of speed that must not change what is computed: compiled blocks, and clipping under mixed precision."""

import copy
import shutil

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from runs import ar_module, image_data, tokenizer_module, trainer
from tiny_models import SIZE, TOKENIZER, make_ar, make_tokenizer, random_codes

from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import TokenizerModule
from dar_lightning.training.optim import OptimizerConfig

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


@pytest.mark.slow
@needs_compiler
def test_a_compiled_tokenizer_computes_the_same():
    module = tokenizer_module(compile=True)
    assert module.tokenizer.state_dict().keys() == make_tokenizer().state_dict().keys()
    images, u, noise = torch.rand(3, 3, SIZE, SIZE) * 2 - 1, torch.rand(3), torch.randn(3, 3, SIZE, SIZE)
    parts = (module.tokenizer.encoder, module.tokenizer.conditioner, module.tokenizer.decoder)
    assert all(block._compiled_call_impl is not None for part in parts for block in part.blocks)
    compiled = module.tokenizer.training_losses(images, u, noise)["flow"]
    compiled.backward()
    plain_model = make_tokenizer().train()
    plain = plain_model.training_losses(images, u, noise)["flow"]
    plain.backward()
    torch.testing.assert_close(compiled, plain)
    for mine, theirs in zip(module.tokenizer.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    copied = copy.deepcopy(module.tokenizer)  # as EMA does
    torch.testing.assert_close(copied.training_losses(images, u, noise)["flow"], plain)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_ar_model_computes_the_same():
    module = ar_module(compile=True).eval()
    assert all(block._compiled_call_impl is not None for block in module.ar.blocks)
    codes, labels = torch.from_numpy(random_codes(3)), torch.tensor([0, 1, 3])
    torch.testing.assert_close(module.ar(labels, codes), make_ar().eval()(labels, codes))


class Recording(TokenizerModule):
    def configure_gradient_clipping(self, *args, **options) -> None:
        super().configure_gradient_clipping(*args, **options)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norm = torch.nn.utils.get_total_norm(gradients).item()


def float16() -> MixedPrecision:
    """On a CPU Lightning makes bf16 of "16-mixed", but takes the plugin as it is."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize("precision", [{"precision": "bf16-mixed"}, {"plugins": float16}], ids=["bf16", "fp16"])
def test_gradients_are_clipped_under_mixed_precision(precision, images):
    """Lightning refuses this for a fused optimizer that claims to unscale gradients itself. In float16 the gradients
    that are clipped must be unscaled ones: AdamW is then given what it is given in float32."""
    moved = {}
    for name, options in {"mixed": precision, "full": {}}.items():
        options = {key: value() if callable(value) else value for key, value in options.items()}
        module = Recording(TokenizerConfig(**TOKENIZER), OptimizerConfig(lr=1e-3))
        module.tokenizer.load_state_dict(make_tokenizer().state_dict())
        fit = trainer(gradient_clip_val=1e-3, max_steps=1, limit_val_batches=0, **options)
        fit.fit(module, image_data(images))
        assert module.norm == pytest.approx(1e-3, rel=1e-2)
        moved[name] = fit.optimizers[0].state[module.tokenizer.decoder.conv_out.weight]["exp_avg"]
    assert (moved["mixed"] - moved["full"]).norm() < 0.2 * moved["full"].norm()
