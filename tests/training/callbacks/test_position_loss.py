"""Loss and accuracy by position, read back from TensorBoard's file, against the model called by hand."""

import io
import math

import numpy as np
import pytest
import torch
from event_file import scalars, trainer
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import AR, TOKENS, make_ar

from dar_lightning.ar.config import ARConfig
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.errors import UserError
from dar_lightning.training import ARModule
from dar_lightning.training.callbacks import PositionLoss, position_loss
from dar_lightning.training.callbacks.charts import HEIGHT, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
GROUPS = 4


def make_module() -> ARModule:
    module = ARModule(ARConfig(**AR))
    module.ar.load_state_dict(make_ar().state_dict())
    return module


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
    charts = []
    original = position_loss.line_chart
    monkeypatch.setattr(
        position_loss, "line_chart", lambda curves, x_label: charts.append(curves) or original(curves, x_label)
    )
    spy = Spy()
    options = dict(max_steps=4, log_every_n_steps=2, val_check_interval=4)
    fit = trainer(tmp_path, [spy, PositionLoss(GROUPS)], **options)
    fit.fit(make_module(), datamodule=CodesDataModule(*tokens, batch_size=4))
    logged = scalars(tmp_path)

    for step in (1, 3):
        by_hand = np.concatenate([nats(logits, codes) for codes, logits in spy.batches[step - 1 : step + 1]]).mean(0)
        for group in range(GROUPS):
            expected = by_hand[2 * group : 2 * group + 2].mean()
            assert logged[f"groups/train_loss_{group}"][step] == pytest.approx(expected, rel=1e-4)
    model = make_ar()
    model.load_state_dict(spy.weights)
    everything = next(iter(CodesDataModule(*tokens, batch_size=7).val_dataloader()))
    with torch.no_grad():
        logits = model(everything["label"], everything["codes"])
    loss = nats(logits, everything["codes"]).mean(0)
    hit = (logits.argmax(-1) == everything["codes"]).double().mean(0).numpy()
    for name, values in (("loss", loss), ("accuracy", hit)):
        for group in range(GROUPS):
            (value,) = logged[f"groups/val_{name}_{group}"].values()
            assert value == pytest.approx(values[2 * group : 2 * group + 2].mean(), rel=1e-4)
    assert logged["val/loss"].popitem()[1] == pytest.approx(loss.mean(), rel=1e-4)

    assert [list(curves) for curves in charts] == [["validation", "train"], ["validation"]]
    assert charts[0]["train"] == pytest.approx(by_hand, rel=1e-4)
    assert charts[0]["validation"] == pytest.approx(loss, rel=1e-4)
    assert charts[1]["validation"] == pytest.approx(hit)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name in ("loss_by_position", "accuracy_by_position"):
        (picture,) = events.Images(name)
        assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_that_do_not_divide_the_tokens(tokens, tmp_path, groups):
    fit = trainer(tmp_path, [PositionLoss(groups)], max_steps=1)
    with pytest.raises(UserError, match=f"num_groups is {groups}: it must divide the {TOKENS} tokens"):
        fit.fit(make_module(), datamodule=CodesDataModule(*tokens, batch_size=4))
