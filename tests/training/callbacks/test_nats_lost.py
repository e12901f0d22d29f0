"""Passes: what validation logs of several tokens a pass, against sums by hand."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny_models import GROUPS, TOKENS, make_ar
from tiny_training import STILL, ar_module, scalars, token_data, trainer

from dar_lightning.errors import UserError
from dar_lightning.training import AblationModule, ARModule
from dar_lightning.training.callbacks import Passes

PASSES = {"tokens_per_pass": 2, "sequential_tokens": 2, "order": "strided_in_group", "order_groups": 2}


def loss_of(ar, codes: torch.Tensor, labels: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Of each group, in nats an image."""
    loss = F.cross_entropy(ar(labels, codes[:, order]).transpose(1, 2), codes[:, order], reduction="none")
    return torch.stack([loss[:, i] for i in order.argsort()], dim=1).mean(dim=0).view(GROUPS, -1).sum(dim=1)


@torch.no_grad()
def test_nats_lost_by_group(tokens, tmp_path):
    reference = make_ar(seed=1, order="reversed")
    reference.save_pretrained(tmp_path / "one")
    callback = Passes(str(tmp_path / "one"), draws=3, num_groups=GROUPS)
    module, data = ar_module(PASSES | STILL, AblationModule), token_data(tokens, batch_size=3)
    trainer(callback, folder=tmp_path).validate(module, data, verbose=False)
    logged = {name: next(iter(points.values())) for name, points in scalars(tmp_path).items()}
    batches = list(data.val_dataloader())
    valid = torch.cat([batch["valid"] for batch in batches])
    codes, labels = (torch.cat([batch[name] for batch in batches])[valid] for name in ("codes", "label"))
    lost = loss_of(module.ar, codes, labels, module.ar.order)
    lost -= loss_of(reference, codes, labels, torch.arange(TOKENS).flip(0))
    found = [logged[f"groups/val_nats_lost_{group}"] for group in range(GROUPS)]
    assert found == pytest.approx(lost.tolist(), abs=1e-4)
    assert logged["val/nats_lost"] == pytest.approx(float(lost.sum()), abs=1e-4)
    assert logged["val/passes"] == 2 + (TOKENS - 2) / 2
    assert 0 < logged["val/seconds_per_image"] < 10


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"tokens_per_pass": 2}, "tokens_per_pass is 2, need 1"), ({"vocab_size": 16}, "vocab_size is 16, need 32")],
)
def test_references_that_cannot_be_compared(changes, reason, tokens, tmp_path):
    make_ar(**changes).save_pretrained(tmp_path)
    run = trainer(Passes(str(tmp_path), num_groups=GROUPS))
    with pytest.raises(UserError, match=f"Passes: reference .*: {reason}"):
        run.validate(ar_module(PASSES, AblationModule), token_data(tokens), verbose=False)


def test_groups_and_images_that_there_are_not(tokens):
    refused("draws is -1", Passes, draws=-1)
    with pytest.raises(UserError, match="num_groups is 3: it must divide the 8 tokens"):
        trainer(Passes(num_groups=3)).validate(ar_module(), token_data(tokens), verbose=False)


@pytest.mark.parametrize("kind", [ARModule, AblationModule])
def test_a_training_step_of_several_tokens_a_pass(kind, tokens):
    """The loss is that of the model's own logits, and every weight learns, those of target places too."""
    module = ar_module({"tokens_per_pass": 4, "order_groups": GROUPS} | STILL, kind)
    module.log = module.log_dict = lambda *args, **options: None
    batch = next(iter(token_data(tokens).train_dataloader()))
    loss = module.training_step(batch, 0)["loss"]
    logits = module.ar(batch["label"], batch["codes"])
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, 1), batch["codes"].flatten(), reduction="none").mean())
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in module.parameters())
