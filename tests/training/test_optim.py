"""The optimizer against closed forms: who gets weight decay, the learning rate of every step, and clipping."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from refusals import refused
from tiny_training import image_data, tokenizer_module, trainer
from torch import nn
from torch.utils.data import DataLoader

from dar_lightning.training.batch_plan import TrainingPlan
from dar_lightning.training.optim import OptimizerConfig, configure_adamw


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.LayerNorm(2)
        self.table, self.conv = nn.Embedding(4, 2), nn.Conv2d(1, 2, 3)
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_weight_decay_on_matrices_only():
    module = Small()
    optimizer = configure_adamw(module, OptimizerConfig(weight_decay=0.3, betas=(0.8, 0.9)), 10)["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay.get(id(p)) for name, p in module.named_parameters()}
    matrices = {"linear.weight", "table.weight", "conv.weight"}
    vectors = {"linear.bias", "norm.weight", "norm.bias", "conv.bias"}
    assert names == dict.fromkeys(matrices, 0.3) | dict.fromkeys(vectors, 0.0) | {"frozen": None}
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("settings", "corners"),
    [
        ({}, [(0, 1.0), (20, 1.0)]),
        ({"warmup_steps": 4}, [(0, 0.0), (4, 1.0), (20, 1.0)]),
        ({"warmup_steps": 4, "decay_steps": 8, "final_lr": 0.005}, [(0, 0.0), (4, 1.0), (12, 1.0), (20, 0.1)]),
        ({"decay_steps": 40, "final_lr": 0.005}, [(0, 0.55), (20, 0.1)]),
    ],
)
def test_factor_is_linear_between_its_corners(settings, corners):
    """Corners: (step, factor) of a run of 20 steps."""
    config = OptimizerConfig(lr=0.05, **settings)
    steps = np.arange(21)
    assert np.allclose([config.factor(step, 20) for step in steps], np.interp(steps, *zip(*corners, strict=True)))


class Recorder(LightningModule):
    """Notes the learning rate that each optimizer step uses."""

    def __init__(self, config: OptimizerConfig):
        super().__init__()
        self.layer, self.config, self.used = nn.Linear(1, 1), config, []

    def configure_optimizers(self):
        plan = TrainingPlan.of(self.trainer)
        return configure_adamw(self, self.config, plan.steps, plan.steps_per_epoch)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def on_before_optimizer_step(self, optimizer):
        self.used.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize(
    ("length", "decay", "accumulate"),
    [({"max_epochs": 3}, {"decay_steps": 4}, 1), ({"max_steps": 12}, {"decay_epochs": 2}, 2)],
    ids=str,
)
def test_the_trainer_steps_along_it(length, decay, accumulate):
    """Twelve steps, of which the last four descend; an epoch has four batches."""
    module = Recorder(OptimizerConfig(lr=0.1, warmup_steps=3, **decay))
    trainer(accumulate_grad_batches=accumulate, **length).fit(module, DataLoader(torch.ones(4, 1)))
    expected = 0.1 * np.interp(np.arange(12), [0, 3, 8, 12], [0.0, 1.0, 1.0, 0.0])
    assert np.allclose(module.used, expected[:, None])


@pytest.mark.parametrize(
    ("settings", "max_steps", "message"),
    [
        ({"decay_steps": 5, "decay_epochs": 2}, 100, "decay_steps 5 and decay_epochs 2: one must be 0"),
        ({"decay_epochs": 2}, 100, "decay_epochs needs data with an end: use decay_steps"),
        *(({"decay_steps": 5}, end, r"needs an end: set trainer\.max_steps") for end in (-1, 0, float("inf"))),
        *(({name: -1}, 10, name) for name in ("lr", "weight_decay", "warmup_steps", "final_lr")),
        ({"lr": 0.0}, 10, "positive lr"),
    ],
)
def test_impossible_settings(settings, max_steps, message):
    configure_adamw(Small(), OptimizerConfig(), max_steps)
    refused(message, lambda: configure_adamw(Small(), OptimizerConfig(**settings), max_steps))


def float16() -> MixedPrecision:
    """On a CPU Lightning makes bf16 of "16-mixed", but takes the plugin as it is."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def test_gradients_are_clipped_under_mixed_precision(images):
    """Lightning refuses this for a fused optimizer that claims to unscale gradients itself. In float16 the gradients
    that are clipped must be unscaled ones: AdamW is then given what it is given in float32."""
    moments = []
    for options in ({}, {"precision": "bf16-mixed"}, {"plugins": float16()}):
        module = tokenizer_module(optimizer=OptimizerConfig(lr=1e-3))
        fit = trainer(gradient_clip_val=1e-3, max_steps=1, limit_val_batches=0, **options)
        fit.fit(module, image_data(images))
        gradients = [parameter.grad for parameter in module.parameters()]
        assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-2)
        moments.append(fit.optimizers[0].state[module.tokenizer.decoder.conv_out.weight]["exp_avg"])
    full, *mixed = moments
    assert all((moment - full).norm() < 0.2 * full.norm() for moment in mixed)
