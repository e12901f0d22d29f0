"""NaN and infinity cost one step on all ranks, and nothing else."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from runs import trainer

from dar_lightning.errors import UserError
from dar_lightning.training.callbacks import EMA, SkipBadSteps
from dar_lightning.training.optim import OptimizerConfig, configure_adamw


class Line(L.LightningModule):
    """Linear regression; batches hold the poison of their gradients and loss, 1 for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.weights: list[torch.Tensor] = []
        self.lrs: list[float] = []

    def training_step(self, batch, batch_idx):
        inputs, poison = batch  # (B, 3), (B,)
        loss = self.layer(inputs).square().mean()
        return loss + (self.layer.bias * (poison - 1)).mean()

    def configure_optimizers(self):
        return configure_adamw(self, OptimizerConfig(lr=0.1, weight_decay=0.1, warmup_steps=4), 100)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.weights.append(self.layer.weight.detach().clone())
        self.lrs.append(self.optimizers().param_groups[0]["lr"])


def fit(poison: list[float], max_in_a_row=3, callbacks=(), skip=True, module=None, **options):
    """One batch of two samples per entry."""
    inputs = torch.randn(len(poison), 2, 3, generator=torch.Generator().manual_seed(1))
    batches = [(one, torch.full((2,), value)) for one, value in zip(inputs, poison, strict=True)]
    skipper = [SkipBadSteps(max_in_a_row)] if skip else []
    run, module = trainer(*skipper, *callbacks, **{"max_epochs": 1} | options), module or Line()
    run.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module, run


@pytest.mark.parametrize(("bad", "clip"), [(float("nan"), 1.0), (float("inf"), None), (-float("inf"), 1.0)])
def test_a_bad_step_changes_nothing_but_the_count(bad, clip):
    module, trainer = fit([1, 1, bad, 1], gradient_clip_val=clip)
    healthy, _ = fit([1, 1, 1, 1], gradient_clip_val=clip, skip=False)
    assert torch.equal(module.weights[1], healthy.weights[1])
    assert torch.equal(module.weights[2], module.weights[1])
    assert not torch.equal(module.weights[3], module.weights[2])
    assert module.lrs == healthy.lrs
    assert trainer.global_step == 4
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    steps = [int(state["step"]) for state in trainer.optimizers[0].state.values()]
    assert steps == [3, 3], "AdamW's bias correction counts updates"


def test_healthy_steps_have_the_bits_of_a_run_without_it():
    watched, _ = fit([1] * 5, gradient_clip_val=0.5)
    plain, _ = fit([1] * 5, gradient_clip_val=0.5, skip=False)
    assert all(torch.equal(*pair) for pair in zip(watched.weights, plain.weights, strict=True))


def test_one_bad_batch_of_an_accumulated_step():
    nan = float("nan")
    module, trainer = fit([1, 1, nan, 1, 1, 1], accumulate_grad_batches=2)
    assert torch.equal(module.weights[3], module.weights[1])
    assert not torch.equal(module.weights[5], module.weights[3])
    assert trainer.global_step == 3
    assert trainer.callback_metrics["train/skipped_steps"] == 1


class Normed(Line):
    """With running statistics, and what they are after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3, affine=False)
        self.statistics: list[list[torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        inputs, poison = batch
        return super().training_step((self.norm(inputs * poison[:, None]), poison), batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.statistics.append([buffer.clone() for buffer in self.buffers()])


@pytest.mark.parametrize("bad", [2, 3])  # the first or the second batch of a step
def test_a_skipped_step_leaves_running_statistics_as_they_were(bad):
    poison = [1.0] * 6
    poison[bad] = float("nan")
    module, _ = fit(poison, module=Normed(), accumulate_grad_batches=2)
    assert not all(statistic.isfinite().all() for statistic in module.statistics[2]) or bad == 3
    assert all(torch.equal(*pair) for pair in zip(module.statistics[3], module.statistics[1], strict=True))
    assert int(module.norm.num_batches_tracked) == 4
    assert not torch.equal(module.norm.running_mean, module.statistics[3][0])
    assert module.norm.running_mean.isfinite().all()


def test_an_overflow_of_float16_is_the_gradient_scalers_business():
    """Its scale finds its size in more steps than may be bad in a row; a loss that is no number counts."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module, trainer = fit([1] * 60 + [float("nan")] + [1], plugins=plugin)
    still = [torch.equal(*pair) for pair in itertools.pairwise(module.weights[:60])]
    assert sum(still) > 3, "a test of nothing"
    assert scaler.get_scale() < 2.0**60
    assert not torch.equal(module.weights[-1], module.weights[-2])
    assert torch.equal(module.weights[-2], module.weights[-3])
    assert module.layer.weight.isfinite().all()
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def float16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))


@pytest.mark.parametrize("plugin", [None, float16])
def test_an_infinite_loss_with_finite_gradients(plugin):
    class Shifted(Line):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (float("inf") if batch_idx == 1 else 0.0)

    module, _ = fit([1, 1, 1], module=Shifted(), plugins=plugin and plugin())
    assert torch.equal(module.weights[1], module.weights[0])
    assert not torch.equal(module.weights[2], module.weights[1])
    assert module.layer.weight.isfinite().all()


def test_too_many_in_a_row_end_the_run_with_clean_weights_and_average():
    nan, average, kept = float("nan"), EMA(0.9), []

    class Keep(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            kept.append((pl_module, trainer.global_step))

    with pytest.raises(UserError, match=r"stopped at step 7: .* NaN or infinite in 3 steps in a row") as caught:
        fit([1, nan, nan, 1, nan, nan, nan, 1], callbacks=[average, Keep()])
    assert "\n" not in str(caught.value)
    ((module, step),) = kept
    assert step == 7
    for model in (module, average._average_model):
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def bad_batches() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader([(torch.ones(2, 3), torch.full((2,), float("nan")))], batch_size=None)


def test_counts_are_in_the_checkpoint(tmp_path):
    nan = float("nan")
    _, run = fit([1, nan, nan])
    run.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="in 3 steps in a row"):
        trainer(SkipBadSteps(3), max_epochs=2).fit(Line(), bad_batches(), ckpt_path=tmp_path / "x.ckpt")


class Other(Line):
    def __init__(self, make) -> None:
        super().__init__()
        self.configure_optimizers = lambda: make(self.parameters())


def test_wrong_options():
    """An optimizer that asks the gradient scaler would have its found_inf in the place of ours."""
    with pytest.raises(UserError, match="max_in_a_row: 0 steps"):
        SkipBadSteps(0)
    with pytest.raises(UserError, match="needs an optimizer with fused=True, not SGD"):
        fit([1.0], module=Other(lambda parameters: torch.optim.SGD(parameters, lr=0.1)))
    fit([1.0], module=Other(lambda parameters: torch.optim.AdamW(parameters, fused=True)))
    with pytest.raises(UserError, match=r"precision 16-mixed needs an optimizer whose _step_supports_amp_scaling"):
        fit([1.0], module=Other(lambda parameters: torch.optim.AdamW(parameters, fused=True)), plugins=float16())


class Ranks(Line):
    """Bad on one rank: a loss whose gradients are finite, so that only the flag can tell; and a gradient."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        bad_loss = self.global_rank == 1 and batch_idx == 1
        bad_gradient = self.global_rank == 0 and batch_idx == 3
        return loss + (float("inf") if bad_loss else 0) + (self.layer.bias.sum() * float("nan") if bad_gradient else 0)


def on_ranks() -> tuple[float, list]:
    module, run = fit([1] * 5, module=Ranks(), devices=2, strategy="ddp", use_distributed_sampler=False)
    return float(run.callback_metrics["train/skipped_steps"]), [weights.numpy() for weights in module.weights]


@pytest.mark.slow
def test_two_ranks_skip_the_same_steps(two_ranks):
    (skipped, one), (_, two) = two_ranks(on_ranks)
    assert skipped == 2
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert [bool((after != before).any()) for before, after in itertools.pairwise(one)] == [False, True, False, True]
