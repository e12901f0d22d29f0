"""Loss and accuracy by position, read back from TensorBoard's file, against the model called by hand."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from matplotlib.axes import Axes
from runs import ar_module, events, scalars, token_data, trainer
from tiny_models import TOKENS, make_ar

from dar_lightning.errors import UserError
from dar_lightning.training.callbacks import PositionLoss

GROUPS = 4


class Spy(Callback):
    """Keeps what was trained on and the logits that came out, and the last model."""

    def __init__(self):
        self.batches = []

    def on_train_start(self, trainer, pl_module):
        def keep(model, inputs, logits):
            if model.training:
                self.batches.append((inputs[1], logits.detach()))

        pl_module.ar.register_forward_hook(keep)

    def on_validation_start(self, trainer, pl_module):
        self.weights = {name: tensor.clone() for name, tensor in pl_module.ar.state_dict().items()}


def nats(logits, codes) -> np.ndarray:
    """-log p of each token, (B, N), token by token."""
    table = logits.double().exp()
    return np.array(
        [
            [-math.log(table[b, n, code] / table[b, n].sum()) for n, code in enumerate(sequence)]
            for b, sequence in enumerate(codes.tolist())
        ]
    )


def test_by_position(tokens, tmp_path, monkeypatch):
    lines, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, values, **how: lines.append((how["label"], values)) or plot(axes, values, **how)
    )
    spy = Spy()
    options = dict(max_steps=4, log_every_n_steps=2, val_check_interval=4)
    trainer(spy, PositionLoss(GROUPS), folder=tmp_path, **options).fit(ar_module(), token_data(tokens))
    logged = scalars(tmp_path)

    for step in (1, 3):
        by_hand = np.concatenate([nats(logits, codes) for codes, logits in spy.batches[step - 1 : step + 1]]).mean(0)
        for group in range(GROUPS):
            expected = by_hand[2 * group : 2 * group + 2].mean()
            assert logged[f"groups/train_loss_{group}"][step] == pytest.approx(expected, rel=1e-4)
    model = make_ar()
    model.load_state_dict(spy.weights)
    everything = next(iter(token_data(tokens, 7).val_dataloader()))
    with torch.no_grad():
        logits = model(everything["label"], everything["codes"])
    loss = nats(logits, everything["codes"]).mean(0)
    hit = (logits.argmax(-1) == everything["codes"]).double().mean(0).numpy()
    for name, values in (("loss", loss), ("accuracy", hit)):
        for group in range(GROUPS):
            (value,) = logged[f"groups/val_{name}_{group}"].values()
            assert value == pytest.approx(values[2 * group : 2 * group + 2].mean(), rel=1e-4)
    assert logged["val/loss"].popitem()[1] == pytest.approx(loss.mean(), rel=1e-4)

    labels, values = zip(*lines, strict=True)
    assert labels == ("validation", "train", "validation")
    for found, expected in zip(values, (loss, by_hand, hit), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert [len(events(tmp_path).Images(f"{name}_by_position")) for name in ("loss", "accuracy")] == [1, 1]


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_the_tokens(tokens, groups):
    with pytest.raises(UserError, match=f"num_groups is {groups}: it must divide the {TOKENS} tokens"):
        trainer(PositionLoss(groups), max_steps=1).fit(ar_module(), token_data(tokens))
