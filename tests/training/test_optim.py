"""The optimizer against closed forms: who gets weight decay, every learning rate, clipping, accumulation."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from refusals import refusal, refused
from tiny_models import fit_ar
from tiny_training import events, image_data, tokenizer_module, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dar_lightning.cli import main
from dar_lightning.data.sampler import TrainSampler, shuffled
from dar_lightning.training.batch_plan import TrainingPlan, accumulation
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


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "devices", "expected"),
    [
        (1024, 128, 8, 1),
        (1024, 64, 1, 16),
        (6, 3, 2, 1),
        (1024, 128, 16, r"global_batch is 1024: not a multiple of batch_size 128 x 16 .* = 2048; use .*batch_size 64$"),
        (1024, 48, 8, r"= 384; use data\.init_args\.batch_size 32 or 64$"),
        (1024, 64, 6, r"6 devices cannot share it evenly; use 1020 or 1026$"),
        (4, 1, 8, r"8 devices cannot share it evenly; use 8$"),
    ],
)
def test_the_number_of_parts(global_batch, batch_size, devices, expected):
    """What does not fit is answered with what would."""
    if isinstance(expected, int):
        assert accumulation(global_batch, batch_size, devices) == expected
    else:
        refused(expected, accumulation, global_batch, batch_size, devices)


@pytest.mark.parametrize("division", [(1, 24, 1), (2, 3, 4), (4, 1, 6)], ids=str)
def test_steps_hold_the_same_samples_however_they_are_divided(division):
    """103 samples in steps of 24: four steps an epoch, and 7 samples are left out."""
    devices, batch_size, parts = division
    steps = [set() for _ in range(8)]
    for rank in range(devices):
        sampler = TrainSampler(
            TensorDataset(torch.zeros(103)), lambda e: shuffled([50, 53], 0, e, 2), batch_size, devices, rank, parts
        )
        assert sampler.batches == 4 * parts
        for epoch in range(2):
            sampler.position = epoch * sampler.batches
            for i, ticket in enumerate(sampler):
                steps[4 * epoch + i // (batch_size * parts)].add((ticket.epoch, ticket.index))
    expected = [(epoch, shuffled([50, 53], 0, epoch, 2)[24 * i : 24 * (i + 1)]) for epoch in range(2) for i in range(4)]
    assert steps == [{(epoch, int(index)) for index in indices} for epoch, indices in expected]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--global_batch=6"], "global_batch is 6: not a multiple of batch_size 4 x 1 device(s) = 4; use"),
        (["--global_batch=0"], "global_batch is 0: it must be at least 1"),
        (["--global_batch=8", "--trainer.accumulate_grad_batches=3"], "8 makes it 2; leave one of them out"),
    ],
)
def test_mistakes_end_before_the_first_file(options, line, tokens, tmp_path, capsys):
    assert line in refusal(capsys, [*fit_ar(*tokens, tmp_path), *options])
    assert not list(tmp_path.iterdir())


def test_the_plan_is_printed_and_logged(tokens, tmp_path, caplog):
    options = ["--data.init_args.batch_size=2", "--global_batch=8", "--trainer.max_epochs=3", "--trainer.max_steps=-1"]
    descent = ["--model.init_args.optimizer.decay_epochs=1.5", "--model.init_args.optimizer.lr=1e-3"]
    with caplog.at_level("INFO"):
        main([str(word) for word in [*fit_ar(*tokens, tmp_path), *options, *descent]])
    plan = "global batch 8 = 2 x 1 device x 4 accumulated; 6 steps (3 epochs of 2); lr 0.001"
    assert plan in caplog.text
    assert events(tmp_path).Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode() == plan
