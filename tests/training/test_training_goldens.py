"""The official training programs' twelve steps, by `dar fit`; and what other choices would have given.

Losses, learning rates and gradient norms are those that the run logs, weights and average those of its checkpoint.
`docs/fidelity.md` has the figures.
"""

from pathlib import Path

import golden_training
import pytest
import torch
from golden_training import numbers, run

from dar_lightning.tokenizer.quantizers.vector import VectorQuantizer
from dar_lightning.training.callbacks.ema import Average
from dar_lightning.training.optim import OptimizerConfig

ROUNDING = 1e-6  # of losses; gradient norms, sums over all parameters, have three times as much
# A double-precision run of the same model ends 2.1e-5 from the golden, and so it does from a run of ours.
FLOAT32 = 2e-5
# One step of the average is so small that an entry near 1 that rounds the other way once makes 3e-4.
AVERAGE = 1e-3


def test_the_tokenizer(tmp_path):
    found = run("tokenizer", tmp_path)
    assert found.pop("codes") == 0
    assert found.pop("weights") < FLOAT32
    assert found.pop("average") < AVERAGE
    assert found.pop("grad_norm") < 3 * ROUNDING
    assert set(found) == {"flow", "vq", "commit", "lr"}
    assert max(found.values()) < ROUNDING


def test_the_ar_model(tmp_path):
    found = run("ar", tmp_path)
    assert found.pop("weights") < FLOAT32
    assert set(found) == {"loss", "lr", "grad_norm"}
    assert max(found.values()) < ROUNDING


def test_the_learning_rate_at_full_scale():
    """The AR recipe's, around both ends of its descent; the golden ran on for some steps after it."""
    config = OptimizerConfig(lr=4e-4, weight_decay=0.05, decay_steps=60_000, final_lr=1e-5)
    for step, lr in numbers("train_ar", "steps")["lr_at_full_scale"]:
        assert config.lr * config.factor(step, 360_000) == pytest.approx(lr, rel=1e-12)


# ---- wrong choices: the same runs must see them


def late_warmup(patch) -> None:
    patch.setattr(OptimizerConfig, "factor", lambda self, step, _: min(1, (step + 1) / (self.warmup_steps + 1)))


def early_descent(patch) -> None:
    factor = OptimizerConfig.factor
    patch.setattr(OptimizerConfig, "factor", lambda self, step, steps: factor(self, step + 1, steps))


def large_eps(patch) -> None:
    build = torch.optim.AdamW
    patch.setattr(torch.optim, "AdamW", lambda groups, **options: build(groups, **options, eps=1e-6))


def decayed_norms(patch) -> None:
    build = torch.optim.AdamW
    patch.setattr(
        torch.optim,
        "AdamW",
        lambda groups, **options: build([groups[0], groups[1] | {"weight_decay": 0.01}], **options),
    )


def all_tokens(patch) -> None:
    forward = VectorQuantizer.forward

    def mean_over_all(self, latents):
        quantized, codes, *losses = forward(self, latents)
        return quantized, codes, *(loss.mean().expand_as(loss) for loss in losses)

    patch.setattr(VectorQuantizer, "forward", mean_over_all)


def lerp(patch) -> None:
    @torch.no_grad()
    def update(self, model):
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - self.decay)
        self.n_averaged += 1

    patch.setattr(Average, "update_parameters", update)


def moved_copy(patch) -> None:
    """The first update that sees weights which have moved, the second one, copies, as AveragedModel's first does."""
    update = Average.update_parameters

    def copies(self, model):
        if self.n_averaged <= 1:
            self.begin_anew(model)
        update(self, model)

    patch.setattr(Average, "update_parameters", copies)


def no_label_dropped(patch) -> None:
    tensors = golden_training.tensors

    def undropped(golden, name):
        found = tensors(golden, name)
        return found | {key: torch.ones_like(found[key]) for key in found if key == "class_drop_u"}

    patch.setattr(golden_training, "tensors", undropped)


# What is trained and done, and at least how far the weights end from the golden; for the tokenizer the average too.
WRONG = {
    "warm-up (s + 1) / (W + 1)": ("tokenizer", late_warmup, 0.1, 0.1),
    "eps 1e-6": ("tokenizer", large_eps, 0.02, 0.04),
    "codebook losses over all tokens": ("tokenizer", all_tokens, 0.1, 0.1),
    "average by lerp": ("tokenizer", lerp, 0.0, 0.02),
    "average begun as a copy of moved weights": ("tokenizer", moved_copy, 0.0, 5),
    "descent one step early": ("ar", early_descent, 0.05),
    "decay 0.01 on norms": ("ar", decayed_norms, 0.001),
    "no label dropped": ("ar", no_label_dropped, 0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_choice_is_seen(name, tmp_path: Path, monkeypatch):
    part, change, *least = WRONG[name]
    change(monkeypatch)
    found = run(part, tmp_path)
    assert all(found[key] >= value for key, value in zip(("weights", "average"), least, strict=False))
