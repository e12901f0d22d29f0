"""CodebookWarmup watched from before and after at every step, and its k-means against another implementation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from runs import image_data, trainer
from tiny_models import CODES, TOKENIZER

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import EMA, CodebookWarmup, SkipBadSteps
from dar_lightning.training.callbacks.codebook_warmup import spherical_kmeans
from dar_lightning.training.optim import OptimizerConfig

WARMUP, COLLECT, REVIVE_EVERY, REVIVE_UNTIL, STEPS = 5, 3, 4, 13, 18


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- k-means


def numpy_kmeans(points: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Lloyd's iterations on the sphere, by loops; no cluster may become empty."""
    centres = start.copy()
    for _ in range(iterations):
        nearest = [max(range(len(centres)), key=lambda k: float(point @ centres[k])) for point in points]
        for k in range(len(centres)):
            total = points[np.array(nearest) == k].sum(axis=0)
            centres[k] = total / np.sqrt((total**2).sum())
    return centres


def directions(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=seeded(seed), dtype=torch.float64), dim=-1)


def test_kmeans_against_loops_in_numpy():
    points = directions(200, 4, 0)
    start = points[torch.randperm(200, generator=seeded(7))[:12]]
    ours = spherical_kmeans(points, 12, 5, seeded(7))
    assert np.allclose(ours.numpy(), numpy_kmeans(points.numpy(), start.numpy(), 5), atol=1e-9)


def test_kmeans_finds_the_clusters_that_are_there():
    truth = torch.eye(6, dtype=torch.float64)
    points = F.normalize(truth.repeat_interleave(50, 0) + 0.05 * directions(300, 6, 1), dim=-1)
    centres = spherical_kmeans(points, 24, 20, seeded(0))
    assert float((points @ centres.T).amax(dim=1).min()) > 0.99, "every point has a centre nearby"
    assert set((centres @ truth.T).argmax(dim=1).tolist()) == set(range(6))
    assert torch.allclose(centres.norm(dim=-1), torch.ones(24, dtype=torch.float64))


def test_kmeans_with_fewer_points_than_centres():
    points = torch.eye(3)
    centres = spherical_kmeans(points, 8, 4, seeded(0))
    assert centres.shape == (8, 3)
    assert all((centre == points).all(-1).any() for centre in centres)
    assert (points @ centres.T).amax(dim=1).min() == 1


# ---- in training


class Watch(Callback):
    """Codebook, bypass and what the step gave, at the end of every batch, by the steps that are done then."""

    def __init__(self):
        self.steps, self.codebooks, self.bypass, self.latents, self.codes = [], {}, {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(trainer.global_step)
        key, quantizer = len(self.steps), pl_module.tokenizer.quantizer  # of a batch: of a step, where none accumulate
        self.codebooks[key], self.bypass[key] = quantizer.codebook.detach().clone(), quantizer.bypass
        self.latents[key], self.codes[key] = outputs["latents"].flatten(0, 1), outputs["codes"].flatten()


def train(images, warmup: CodebookWarmup, *more: Callback, batch_size: int = 4, **options) -> tuple[Watch, Watch]:
    """What it was before and after the callback, batch by batch."""
    before, after = Watch(), Watch()
    torch.manual_seed(0)
    module = TokenizerModule(TokenizerConfig(**TOKENIZER), OptimizerConfig(lr=1e-3))
    options = dict(max_steps=STEPS, limit_val_batches=0) | options
    trainer(before, warmup, after, *more, **options).fit(module, image_data(images, batch_size))
    return before, after


def callback() -> CodebookWarmup:
    return CodebookWarmup(WARMUP, COLLECT, revive_every=REVIVE_EVERY, revive_until=REVIVE_UNTIL)


@pytest.fixture(scope="module")
def watched(images) -> tuple[Watch, Watch]:
    return train(images, callback())


def changed(watched: tuple[Watch, Watch], step: int) -> set[int]:
    before, after = (watch.codebooks[step] for watch in watched)
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


def test_warm_up_is_unquantized(watched):
    before, after = watched
    assert [before.bypass[step] for step in range(1, STEPS + 1)] == [step <= WARMUP for step in range(1, STEPS + 1)]
    assert [after.bypass[step] for step in range(1, STEPS + 1)] == [step < WARMUP for step in range(1, STEPS + 1)]


def test_the_codebook_moves_at_its_steps_only(watched):
    revivals = {step for step in range(WARMUP + 1, REVIVE_UNTIL + 1) if (step - WARMUP) % REVIVE_EVERY == 0}
    assert {step for step in range(1, STEPS + 1) if changed(watched, step)} <= {WARMUP} | revivals
    assert changed(watched, WARMUP) == set(range(CODES))
    assert revivals == {9, 13}


def test_the_codebook_starts_from_centres_of_the_last_latents(watched):
    _, after = watched
    latents = torch.cat([after.latents[step] for step in range(WARMUP - COLLECT + 1, WARMUP + 1)])
    assert latents.shape == (COLLECT * 4 * 8, 4)
    centres = after.codebooks[WARMUP]
    assert torch.equal(centres, spherical_kmeans(latents, CODES, 10, seeded(WARMUP)))
    nearest = (latents @ centres.T).amax(dim=1)
    random = F.normalize(torch.randn(CODES, 4, generator=seeded(0)), dim=-1)
    assert nearest.mean() > (latents @ random.T).amax(dim=1).mean(), "closer than any other codebook"


@pytest.mark.parametrize("step", [9, 13])
def test_dead_codes_move_onto_latents_and_used_ones_stay(watched, step):
    before, after = watched
    since = range(step - REVIVE_EVERY + 1, step + 1)
    used = {int(code) for past in since for code in before.codes[past]}
    dead = set(range(CODES)) - used
    assert dead, "a test of nothing"
    assert changed(watched, step) == dead
    latents = before.latents[step]
    for code in dead:
        assert (latents == after.codebooks[step][code]).all(dim=1).any()


class Surroundings(Callback):
    """At the end of each step: the codebook's average, and the sizes of the optimizer's moments of its rows."""

    def __init__(self):
        self.averages, self.moments = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        codebook, step = pl_module.tokenizer.quantizer.codebook, trainer.global_step
        (ema,) = [found for found in trainer.callbacks if isinstance(found, EMA)]
        self.averages[step] = ema._average_model.module.tokenizer.quantizer.codebook.detach().clone()
        state = trainer.optimizers[0].state[codebook]
        self.moments[step] = torch.cat([state["exp_avg"], state["exp_avg_sq"]], dim=1).abs().amax(dim=1)


def test_the_average_and_the_optimizer_take_moved_codes_as_new_ones(images, watched):
    seen = Surroundings()
    again = train(images, callback(), EMA(0.9), seen)
    assert torch.equal(again[1].codebooks[STEPS], watched[1].codebooks[STEPS]), "the same run twice"
    watched, after = again, again[1]
    torch.testing.assert_close(seen.averages[WARMUP], after.codebooks[WARMUP])
    for step in (WARMUP + REVIVE_EVERY, WARMUP + 2 * REVIVE_EVERY):
        moved = sorted(changed(watched, step))
        assert moved, "a test of nothing"
        torch.testing.assert_close(seen.averages[step][moved], after.codebooks[step][moved])
        assert not seen.moments[step][moved].any()
        others = sorted(set(range(CODES)) - set(moved))
        assert not torch.allclose(seen.averages[step][others], after.codebooks[step][others])
        assert seen.moments[step][others].any()


def test_accumulated_batches_are_collected_and_counted_and_act_once(images):
    options = dict(max_steps=9, limit_train_batches=20, accumulate_grad_batches=3)  # of 11 batches an epoch
    before, after = train(images, CodebookWarmup(3, 2, revive_every=4, revive_until=7), batch_size=2, **options)
    steps = [0, *before.steps]
    ends = [batch for batch in range(1, len(steps)) if steps[batch] > steps[batch - 1]]
    assert [steps[batch] for batch in ends] == list(range(1, 10))
    assert ends == list(range(3, 28, 3)), "the two batches that fill no whole step are left out"
    acted = [batch for batch in before.codebooks if not torch.equal(before.codebooks[batch], after.codebooks[batch])]
    first, second = ends[2], ends[6]
    assert acted == [first, second]
    collected = torch.cat([after.latents[batch] for batch in range(ends[0] + 1, first + 1)])
    assert len(collected) == 6 * 2 * 8
    assert torch.equal(after.codebooks[first], spherical_kmeans(collected, CODES, 10, seeded(3)))
    used = {int(code) for batch in range(first + 1, second + 1) for code in before.codes[batch]}
    moved = (before.codebooks[second] != after.codebooks[second]).any(dim=1).nonzero().flatten().tolist()
    latents = len(before.latents[second])  # of one batch: fewer than the dead codes there may be
    assert moved == sorted(set(range(CODES)) - used)[:latents]


@pytest.mark.parametrize(("warmup", "collect"), [(0, 1), (3, 4), (3, 0)])
def test_impossible_settings(warmup, collect):
    with pytest.raises(UserError, match=f"collect_steps is {collect}: it must be from 1 to warmup_steps, {warmup}"):
        CodebookWarmup(warmup, collect)


class Poison(Callback):
    """All images but one of each of these steps are not numbers."""

    def __init__(self, *steps: int):
        self.steps = steps

    def on_train_start(self, trainer, pl_module):
        losses = pl_module.tokenizer.training_losses

        def poisoned(images, u=None, noise=None):
            if trainer.global_step + 1 in self.steps:
                images = images.clone()
                images[1:] = float("nan")
            return losses(images, u, noise)

        pl_module.tokenizer.training_losses = poisoned


class AllPoison(Callback):
    """The latents of all steps are no numbers."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.tokenizer.encoder.register_forward_hook(lambda *given: given[-1] * torch.nan)


def test_a_codebook_that_nothing_can_start_is_one_line(images):
    with pytest.raises(UserError, match=r"the 2 steps up to step 3 gave no latent that is finite"):
        train(images, CodebookWarmup(3, 2), AllPoison())


def test_a_skipped_step_makes_no_code_a_used_one(images):
    """The nearest code of what is not a number is the first one."""
    warmup = CodebookWarmup(1, 1, revive_every=100, revive_until=200)
    before, _ = train(images, warmup, Poison(3), SkipBadSteps(3))
    latents = torch.cat([before.latents[step] for step in range(2, STEPS + 1)])
    codes = torch.cat([before.codes[step] for step in range(2, STEPS + 1)])
    finite = latents.isfinite().all(dim=-1)
    assert int((~finite).sum()) == 3 * 8
    assert torch.equal(warmup.counts, torch.bincount(codes[finite], minlength=CODES))


@pytest.mark.parametrize("step", [WARMUP, WARMUP + REVIVE_EVERY])
def test_a_skipped_step_leaves_no_nan_in_the_codebook(images, step):
    before, after = train(images, callback(), Poison(step), SkipBadSteps(3))
    assert not before.latents[step].isfinite().all(), "the step was a bad one"
    assert all(codebook.isfinite().all() for codebook in after.codebooks.values())
    if step <= WARMUP:
        kept = [after.latents[number] for number in range(WARMUP - COLLECT + 1, WARMUP + 1)]
        kept = torch.cat([rows[rows.isfinite().all(dim=-1)] for rows in kept])
        assert len(kept) == (COLLECT * 4 - 3) * 8
        assert torch.equal(after.codebooks[WARMUP], spherical_kmeans(kept, CODES, 10, seeded(WARMUP)))
