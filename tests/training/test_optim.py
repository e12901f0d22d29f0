"""The optimizer against closed forms: who gets weight decay, and the learning rate of every step."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from runs import trainer
from torch import nn
from torch.utils.data import DataLoader

from dar_lightning.errors import UserError
from dar_lightning.training.batch_plan import TrainingPlan
from dar_lightning.training.optim import OptimizerConfig, configure_adamw


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.table = nn.Embedding(4, 2)
        self.conv = nn.Conv2d(1, 2, 3)
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
        ({"decay_steps": 8}, [(0, 1.0), (12, 1.0), (20, 0.0)]),
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
    [
        ({"max_steps": 12}, {"decay_steps": 4}, 1),
        ({"max_epochs": 3}, {"decay_steps": 4}, 1),
        ({"max_epochs": 6}, {"decay_epochs": 2}, 2),
        ({"max_steps": 12}, {"decay_epochs": 2}, 2),
    ],
    ids=str,
)
def test_the_trainer_steps_along_it(length, decay, accumulate):
    """Twelve steps, of which the last four descend; an epoch has four batches."""
    module = Recorder(OptimizerConfig(lr=0.1, warmup_steps=3, **decay))
    trainer(accumulate_grad_batches=accumulate, **length).fit(module, DataLoader(torch.ones(4, 1)))
    expected = 0.1 * np.interp(np.arange(12), [0, 3, 8, 12], [0.0, 1.0, 1.0, 0.0])
    assert np.allclose(module.used, expected[:, None])


def test_a_descent_is_in_steps_or_in_epochs_of_data_with_an_end():
    with pytest.raises(UserError, match="decay_steps 5 and decay_epochs 2: one must be 0"):
        OptimizerConfig(decay_steps=5, decay_epochs=2)
    with pytest.raises(UserError, match="decay_epochs needs data with an end: use decay_steps"):
        configure_adamw(Small(), OptimizerConfig(decay_epochs=2), 100)


@pytest.mark.parametrize("max_steps", [-1, 0, float("inf")])
def test_a_descent_needs_an_end(max_steps):
    configure_adamw(Small(), OptimizerConfig(), max_steps)
    with pytest.raises(UserError, match=r"decay_steps needs an end: set trainer\.max_steps"):
        configure_adamw(Small(), OptimizerConfig(decay_steps=5), max_steps)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"weight_decay": -1}, {"warmup_steps": -1}, {"final_lr": -1e-5}])
def test_impossible_settings(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
