"""The official training programs' twelve steps, by `dar fit`.

Losses, learning rates and gradient norms are those that the run logs, weights and average those of its checkpoint.
`docs/fidelity.md` has the figures, also of what other choices would have given; `benchmarks/mutants.yaml` makes them.
"""

import pytest
from golden_training import numbers, run

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
