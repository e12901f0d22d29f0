"""Annealed orders: which share of samples is shuffled and how, in a step, after a resume, and what is exported."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from refusals import refused
from tiny_models import AR, GROUPS, TOKENS, make_ar, random_codes
from tiny_training import STILL, ar_module, token_data, trainer

from dar_lightning import ARConfig, ARModel
from dar_lightning.cli import main
from dar_lightning.training import AblationModule
from dar_lightning.training.ablation import Annealing
from dar_lightning.training.module import seed_batch

TABLES = {"place_tables": "own_and_target", "order_groups": GROUPS}
BATCH = {"codes": torch.from_numpy(random_codes(4)), "label": torch.arange(4), "valid": torch.ones(4, dtype=bool)}
SAMPLES = 4000
PER_GROUP = TOKENS // GROUPS


def test_the_share_falls_from_one_to_zero():
    shares = [Annealing(100, 200).share(step) for step in (0, 99, 100, 125, 150, 200, 10**6)]
    assert shares == [1, 1, 1, 0.75, 0.5, 0, 0]
    assert [Annealing().share(step) for step in (0, 1, 100)] == [0, 0, 0], "never"
    assert [Annealing(5, 5).share(step) for step in (0, 4, 5)] == [1, 1, 0], "no step between"


def within_error(found: float, probability: float) -> bool:
    return abs(found - probability) < 4.5 * math.sqrt(probability * (1 - probability) / SAMPLES)


@pytest.mark.parametrize("within", ["image", "group"])
def test_orders_are_shuffled_evenly(within):
    """By counting: how many samples, and how often each token is written at each place."""
    torch.manual_seed(0)
    ar, annealing = make_ar(**TABLES), Annealing(100, 200, within)
    size = TOKENS if within == "image" else PER_GROUP
    for step, share in ((0, 1.0), (160, 0.4)):
        orders = annealing.draw(ar, SAMPLES, step)
        assert (orders.sort(dim=1).values == torch.arange(TOKENS)).all()
        assert ((orders // size) == torch.arange(TOKENS) // size).all(), "each in its group"
        counts = torch.nn.functional.one_hot(orders, TOKENS).double().mean(0)
        for index in range(TOKENS):
            for place in range(index // size * size, (index // size + 1) * size):
                assert within_error(counts[index, place], share / size + (1 - share) * (index == place))
        moved = (orders != torch.arange(TOKENS)).any(dim=1).double().mean()
        assert within_error(moved, share * (1 - math.factorial(size) ** (-TOKENS // size)))


def test_groups_of_another_order():
    torch.manual_seed(0)
    orders = Annealing(1, 1, "group").draw(make_ar(order="reversed", **TABLES), 50, 0)
    assert ((orders // PER_GROUP) == torch.arange(TOKENS - 1, -1, -1) // PER_GROUP).all()
    assert len(orders.unique(dim=0)) > 8


def test_each_rank_and_batch_draws_its_own():
    ar, drawn = make_ar(**TABLES), {}
    for rank, batch in ((0, 7), (1, 7), (0, 8), (0, 7)):
        seed_batch(rank, batch)
        orders = Annealing(5, 5).draw(ar, 4, 0)
        assert torch.equal(drawn.setdefault((rank, batch), orders), orders), "the same place in a run"
    assert len({str(orders) for orders in drawn.values()}) == 3


def test_after_the_end_a_step_is_the_plain_one(monkeypatch):
    """With dropout: not even a random number is drawn."""

    def step(now: int, **options) -> dict:
        monkeypatch.setattr(AblationModule, "global_step", now)
        module = ar_module(TABLES, AblationModule, **options)
        torch.manual_seed(0)
        return module.training_step(BATCH, 0)

    plain = step(0)
    assert "shuffled" not in plain["parts"]
    for now, share in ((6, 0), (5, 0.25), (0, 1)):
        outputs = step(now, annealing=Annealing(2, 6))
        assert (outputs["loss"] == plain["loss"]) == (now == 6)
        assert outputs["parts"]["shuffled"] == share


def test_a_step_trains_on_the_tokens_as_they_are_written():
    module = ar_module(TABLES | STILL, AblationModule, annealing=Annealing(5, 5))
    torch.manual_seed(3)
    outputs = module.training_step(BATCH, 0)
    order = outputs["order"]
    p = module.ar(BATCH["label"], BATCH["codes"].gather(1, order), order).softmax(dim=-1)
    by_place = torch.empty_like(outputs["token_loss"])
    for row in range(4):
        for index, place in enumerate(order[row]):
            by_place[row, place] = -p[row, index, BATCH["codes"][row, place]].log()
    assert torch.allclose(outputs["token_loss"], by_place, atol=1e-5)
    assert not torch.equal(order, order.sort(dim=1).values)
    module.eval()
    module.log = module.log_dict = lambda *args, **options: None
    assert torch.equal(module.validation_step(BATCH, 0)["order"], torch.arange(TOKENS).expand(4, -1))


class Orders(Callback):
    """What was shuffled in every step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step, batch_idx] = (outputs["order"].tolist(), outputs["parts"]["shuffled"].item())


def test_a_resumed_run_goes_on_with_the_share_and_is_exported(tokens, tmp_path):
    def run(steps: int, **options):
        torch.manual_seed(5)  # of the weights
        orders = Orders()
        module = AblationModule(ARConfig(**AR | TABLES), annealing=Annealing(1, 7))
        fit = trainer(orders, max_steps=steps, accumulate_grad_batches=2, limit_val_batches=0)
        fit.fit(module, token_data(tokens, 2), **options)
        return fit, module, orders.seen

    _, whole, seen = run(6)
    first, _, before = run(3)
    first.save_checkpoint(tmp_path / "three.ckpt")
    last, module, after = run(6, ckpt_path=tmp_path / "three.ckpt")
    assert before | after == seen
    assert (len(before), len(after)) == (6, 6)
    shares = sorted({share for _, share in seen.values()}, reverse=True)
    assert shares == pytest.approx([1, 1 - 1 / 6, 1 - 2 / 6, 1 - 3 / 6, 1 - 4 / 6], abs=1e-6)
    assert all(map(torch.equal, whole.state_dict().values(), module.state_dict().values()))

    last.save_checkpoint(tmp_path / "six.ckpt")
    main(["export", "--ckpt", str(tmp_path / "six.ckpt"), "--output", str(tmp_path / "out")])
    merged = ARModel.from_pretrained(tmp_path / "out")
    assert merged.own_place_embedding is None
    assert merged.config.place_tables == "target"
    logits = module.ar.eval()(BATCH["label"], BATCH["codes"])
    assert torch.equal(merged(BATCH["label"], BATCH["codes"]), logits)


@pytest.mark.parametrize(
    ("config", "annealing", "message"),
    [
        ({}, dict(start=3, end=2), "annealing.start is 3, annealing.end is 2: need 0 <= start <= end"),
        ({}, dict(start=-1), "annealing.start is -1"),
        ({}, dict(within="row"), "annealing.within is 'row': choose from image, group"),
        ({"place_tables": "as_needed"}, dict(end=2), "place_tables is as_needed: with annealing.end 2 it must be"),
        ({"order": "random_per_sample"}, dict(end=2), "annealing.end is 2: config.order random_per_sample is shuffled"),
        ({"order": "interleaved"}, dict(end=2, within="group"), "order interleaved does not write group after group"),
        ({"order_groups": 3}, dict(end=2, within="group"), "order_groups is 3: .* needs a divisor of 8"),
    ],
)
def test_what_does_not_fit_is_said(config, annealing, message):
    refused(message, lambda: AblationModule(ARConfig(**AR | TABLES | config), annealing=Annealing(**annealing)))
