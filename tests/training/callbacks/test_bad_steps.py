"""NaN and infinity cost one step on all ranks, and nothing else."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from refusals import refused
from tiny_training import trainer

from dar_lightning.training.callbacks import EMA, SkipBadSteps
from dar_lightning.training.optim import OptimizerConfig, configure_adamw


class Line(L.LightningModule):
    """Linear regression of normalised inputs; `bad` says what is not finite in which batch.

    A value of the inputs, the loss alone ("loss": its gradients are finite), or the gradients alone ("gradient").
    """

    def __init__(self, bad=()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(3, affine=False)
        self.bad = dict(bad)
        self.weights, self.statistics, self.lrs = [], [], []  # after every batch

    def training_step(self, batch, batch_idx):
        bad = self.bad.get(batch_idx, "1")
        loss = self.layer(self.norm(batch * (1 if bad in ("loss", "gradient") else float(bad)))).square().mean()
        loss = loss + (float("inf") if bad == "loss" else 0)
        return loss + ((0 * self.layer.bias).sqrt().sum() if bad == "gradient" else 0)  # 0, with a slope of inf * 0

    def configure_optimizers(self):
        return configure_adamw(self, OptimizerConfig(lr=0.1, weight_decay=0.1, warmup_steps=4), 100)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.weights.append(self.layer.weight.detach().clone())
        self.statistics.append([buffer.clone() for buffer in self.buffers()])
        self.lrs.append(self.optimizers().param_groups[0]["lr"])


def batches(count: int) -> torch.utils.data.DataLoader:
    data = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(list(data), batch_size=None)


def fit(count: int, module: Line, *callbacks, **options):
    run = trainer(*callbacks, max_epochs=1, **options)
    run.fit(module, batches(count))
    return module, run


def float16(scale: float = 1.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize(
    ("batch", "bad", "accumulate", "clip", "plugin"),
    [
        (2, "nan", 1, 1.0, None),
        (2, "-inf", 1, None, None),
        (2, "loss", 1, None, None),
        (2, "loss", 1, None, float16),
        (2, "gradient", 1, 1.0, None),
        (2, "nan", 2, None, None),  # the first batch of a step
        (3, "inf", 2, 1.0, None),  # the second
    ],
)
def test_a_bad_step_changes_nothing_but_the_count(batch, bad, accumulate, clip, plugin):
    count, step = 4 * accumulate, batch // accumulate

    def run(module, *callbacks):
        options = {"plugins": plugin()} if plugin else {}
        return fit(count, module, *callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **options)

    (module, done), (healthy, _) = run(Line({batch: bad}), SkipBadSteps()), run(Line())
    before, after = step * accumulate - 1, (step + 1) * accumulate - 1
    assert torch.equal(module.weights[before], healthy.weights[before]), "the bits of a run without it"
    assert torch.equal(module.weights[after], module.weights[before])
    assert all(map(torch.equal, module.statistics[after], module.statistics[before]))
    assert int(module.norm.num_batches_tracked) == count - accumulate
    assert not torch.equal(module.weights[-1], module.weights[after])
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert module.lrs == healthy.lrs
    assert (done.global_step, done.callback_metrics["train/skipped_steps"]) == (4, 1)
    steps = [int(state["step"]) for state in done.optimizers[0].state.values()]
    assert steps == [3, 3], "AdamW's bias correction counts updates"


def test_an_overflow_of_float16_is_the_gradient_scalers_business():
    """Its scale finds its size in more steps than may be bad in a row; a loss that is no number counts."""
    module, run = fit(62, Line({60: "nan"}), SkipBadSteps(3), plugins=float16(2.0**60))
    still = [torch.equal(*pair) for pair in itertools.pairwise(module.weights[:60])]
    assert sum(still) > 3, "a test of nothing"
    assert run.scaler.get_scale() < 2.0**60
    assert [torch.equal(*pair) for pair in itertools.pairwise(module.weights[-3:])] == [True, False]
    assert module.layer.weight.isfinite().all()
    assert run.callback_metrics["train/skipped_steps"] == 1


def test_too_many_in_a_row_end_the_run_with_clean_weights_and_average():
    average, module = EMA(0.9), Line(dict.fromkeys((1, 2, 4, 5, 6), "nan"))
    refused(
        r"stopped at step 7: .* NaN or infinite in 3 steps in a row", lambda: fit(8, module, SkipBadSteps(3), average)
    )
    for model in (module, average._average_model):
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_counts_are_in_the_checkpoint(tmp_path):
    _, run = fit(3, Line({1: "nan", 2: "nan"}), SkipBadSteps(3))
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(SkipBadSteps(3), max_epochs=2)
    refused("in 3 steps in a row", lambda: again.fit(Line({0: "nan"}), batches(1), ckpt_path=tmp_path / "x.ckpt"))


def test_wrong_options():
    """An optimizer that asks the gradient scaler would have its found_inf in the place of ours."""

    def with_optimizer(make, **options):
        module = Line()
        module.configure_optimizers = lambda: make(module.parameters())
        fit(1, module, SkipBadSteps(), **options)

    def fused(parameters):
        return torch.optim.AdamW(parameters, fused=True)

    refused("max_in_a_row: 0 steps", SkipBadSteps, 0)
    refused(
        "needs an optimizer with fused=True, not SGD",
        with_optimizer,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    with_optimizer(fused)
    refused(
        "precision 16-mixed needs an optimizer whose _step_supports_amp_scaling",
        lambda: with_optimizer(fused, plugins=float16()),
    )


class Ranks(Line):
    def setup(self, stage):
        self.bad = {1: "loss"} if self.global_rank else {3: "gradient"}


def on_ranks() -> tuple[float, list]:
    options = dict(devices=2, strategy="ddp", use_distributed_sampler=False)
    module, run = fit(5, Ranks(), SkipBadSteps(), **options)
    return float(run.callback_metrics["train/skipped_steps"]), [weights.numpy() for weights in module.weights]


@pytest.mark.slow
def test_two_ranks_skip_the_same_steps(two_ranks):
    """Of an infinite loss whose gradients are finite, only the flag tells the other rank."""
    (skipped, one), (_, two) = two_ranks(on_ranks)
    assert skipped == 2
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert [bool((after != before).any()) for before, after in itertools.pairwise(one)] == [False, True, False, True]
