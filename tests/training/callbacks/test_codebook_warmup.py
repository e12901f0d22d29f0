"""CodebookWarmup watched from before and after at every step, and its k-means against another implementation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_models import CODES, TOKENIZER, TOKENS
from tiny_training import image_data, trainer

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import EMA, CodebookWarmup, SkipBadSteps
from dar_lightning.training.callbacks.codebook_warmup import spherical_kmeans
from dar_lightning.training.optim import OptimizerConfig

WARMUP, COLLECT, REVIVALS, STEPS = 5, 3, (9, 13), 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    """Of 24 centres some lose their points; with fewer points than centres, points repeat."""
    truth = torch.eye(6, dtype=torch.float64)
    points = F.normalize(truth.repeat_interleave(50, 0) + 0.05 * directions(300, 6, 1), dim=-1)
    centres = spherical_kmeans(points, 24, 20, seeded(0))
    assert float((points @ centres.T).amax(dim=1).min()) > 0.99, "every point has a centre nearby"
    assert torch.allclose(centres.norm(dim=-1), torch.ones(24, dtype=torch.float64))
    few = spherical_kmeans(torch.eye(3), 8, 4, seeded(0))
    assert few.shape == (8, 3)
    assert {tuple(centre) for centre in few.tolist()} == {tuple(point) for point in torch.eye(3).tolist()}


class Watch(Callback):
    """What is there at the end of every batch, counted from 1: of every step, where none accumulate."""

    def __init__(self):
        self.steps, self.seen = [0], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        quantizer = pl_module.tokenizer.quantizer
        seen = {"codebook": quantizer.codebook.detach().clone(), "bypass": quantizer.bypass}
        seen |= {"latents": outputs["latents"].flatten(0, 1), "codes": outputs["codes"].flatten()}
        for ema in (found for found in trainer.callbacks if isinstance(found, EMA)):
            seen["average"] = ema._average_model.module.tokenizer.quantizer.codebook.detach().clone()
            state = trainer.optimizers[0].state[quantizer.codebook]
            seen["moments"] = torch.cat([state["exp_avg"], state["exp_avg_sq"]], dim=1).abs().amax(dim=1)
        self.seen[len(self.steps)] = seen
        self.steps.append(trainer.global_step)


def train(images, warmup: CodebookWarmup, *more: Callback, batch_size: int = 4, **options) -> tuple[Watch, Watch]:
    """What it was before and after the callback, batch by batch."""
    before, after = Watch(), Watch()
    torch.manual_seed(0)
    module = TokenizerModule(TokenizerConfig(**TOKENIZER), OptimizerConfig(lr=1e-3))
    options = dict(max_steps=STEPS, limit_val_batches=0) | options
    trainer(before, warmup, after, *more, **options).fit(module, image_data(images, batch_size))
    return before, after


def changed(watched: tuple[Watch, Watch], batch: int) -> list[int]:
    before, after = (watch.seen[batch]["codebook"] for watch in watched)
    return (before != after).any(dim=1).nonzero().flatten().tolist()


def unused(before: Watch, batches: range) -> list[int]:
    """Codes that no finite latent chose."""
    seen = [before.seen[batch] for batch in batches]
    used = torch.cat([one["codes"][one["latents"].isfinite().all(dim=1)] for one in seen])
    return sorted(set(range(CODES)) - set(used.tolist()))


@pytest.fixture(scope="module")
def watched(images) -> tuple[Watch, Watch]:
    return train(images, CodebookWarmup(WARMUP, COLLECT, revive_every=4, revive_until=13), EMA(0.9))


def test_the_codebook_starts_from_centres_of_the_last_latents(watched):
    before, after = watched
    assert [step for step in before.seen if before.seen[step]["bypass"]] == list(range(1, WARMUP + 1))
    assert [step for step in after.seen if after.seen[step]["bypass"]] == list(range(1, WARMUP))
    latents = torch.cat([after.seen[step]["latents"] for step in range(WARMUP - COLLECT + 1, WARMUP + 1)])
    assert latents.shape == (COLLECT * 4 * TOKENS, 4)
    centres = after.seen[WARMUP]["codebook"]
    assert torch.equal(centres, spherical_kmeans(latents, CODES, 10, seeded(WARMUP)))
    random = F.normalize(torch.randn(CODES, 4, generator=seeded(0)), dim=-1)
    nearest, by_chance = ((latents @ codes.T).amax(dim=1).mean() for codes in (centres, random))
    assert nearest > by_chance, "closer than any other codebook"
    assert [step for step in after.seen if changed(watched, step)] == [WARMUP, *REVIVALS]
    assert changed(watched, WARMUP) == list(range(CODES))


@pytest.mark.parametrize("step", REVIVALS)
def test_dead_codes_move_onto_latents_as_new_ones_and_used_ones_stay(watched, step):
    """The moving average takes them as they are, and the optimizer's moments of them are zero."""
    before, after = (watch.seen[step] for watch in watched)
    dead = unused(watched[0], range(step - 3, step + 1))
    assert dead, "a test of nothing"
    assert changed(watched, step) == dead
    assert all((before["latents"] == after["codebook"][code]).all(dim=1).any() for code in dead)
    others = sorted(set(range(CODES)) - set(dead))
    assert torch.equal(after["average"][dead], after["codebook"][dead])
    assert not torch.allclose(after["average"][others], after["codebook"][others])
    assert not after["moments"][dead].any()
    assert after["moments"][others].any()


def test_accumulated_batches_are_collected_and_counted_and_act_once(images):
    options = dict(max_steps=9, limit_train_batches=20, accumulate_grad_batches=3)  # of 11 batches an epoch
    watched = train(images, CodebookWarmup(3, 2, revive_every=4, revive_until=7), batch_size=2, **options)
    before, after = watched
    ends = [batch for batch in before.seen if before.steps[batch] > before.steps[batch - 1]]
    assert ends == list(range(3, 28, 3)), "the two batches that fill no whole step are left out"
    first, second = ends[2], ends[6]
    assert [batch for batch in before.seen if changed(watched, batch)] == [first, second]
    collected = torch.cat([after.seen[batch]["latents"] for batch in range(ends[0] + 1, first + 1)])
    assert len(collected) == 6 * 2 * TOKENS
    assert torch.equal(after.seen[first]["codebook"], spherical_kmeans(collected, CODES, 10, seeded(3)))
    latents = len(before.seen[second]["latents"])  # of one batch: fewer than the dead codes there may be
    assert changed(watched, second) == unused(before, range(first + 1, second + 1))[:latents]


class Poison(Callback):
    """All images but `kept` of each of these steps are not numbers."""

    def __init__(self, steps: tuple[int, ...], kept: int = 1):
        self.steps, self.kept = steps, kept

    def on_train_start(self, trainer, pl_module):
        losses = pl_module.tokenizer.training_losses

        def poisoned(images, u=None, noise=None):
            if trainer.global_step + 1 in self.steps:
                images = images.clone()
                images[self.kept :] = float("nan")
            return losses(images, u, noise)

        pl_module.tokenizer.training_losses = poisoned


def test_skipped_steps_give_no_centre_no_code_and_no_use(images):
    """The nearest code of what is not a number is the first one."""
    warmup = CodebookWarmup(WARMUP, COLLECT, revive_every=4, revive_until=99)
    watched = train(images, warmup, Poison((WARMUP, REVIVALS[0], 15)), SkipBadSteps(3))
    before, after = watched
    kept = torch.cat([after.seen[step]["latents"] for step in range(WARMUP - COLLECT + 1, WARMUP + 1)])
    kept = kept[kept.isfinite().all(dim=1)]
    assert len(kept) == (COLLECT * 4 - 3) * TOKENS
    assert torch.equal(after.seen[WARMUP]["codebook"], spherical_kmeans(kept, CODES, 10, seeded(WARMUP)))
    assert changed(watched, REVIVALS[0]) == unused(before, range(WARMUP + 1, REVIVALS[0] + 1))[:TOKENS]
    assert all(seen["codebook"].isfinite().all() for seen in after.seen.values())
    seen = [before.seen[step] for step in range(REVIVALS[1] + 1, STEPS + 1)]
    codes = torch.cat([one["codes"][one["latents"].isfinite().all(dim=1)] for one in seen])
    assert len(codes) == (3 * 4 - 3) * TOKENS
    assert torch.equal(warmup.counts, torch.bincount(codes, minlength=CODES))


def test_a_codebook_that_nothing_can_start_and_impossible_settings_are_one_line(images):
    with pytest.raises(UserError, match=r"the 2 steps up to step 3 gave no latent that is finite"):
        train(images, CodebookWarmup(3, 2), Poison((2, 3), kept=0))
    for warmup, collect in ((0, 1), (3, 4), (3, 0)):
        with pytest.raises(UserError, match=f"collect_steps is {collect}: it must be from 1 to warmup_steps, {warmup}"):
            CodebookWarmup(warmup, collect)


def test_a_run_that_ends_before_the_codebook_starts_says_so(images, caplog):
    with caplog.at_level("INFO"):
        train(images, CodebookWarmup(2, 1), max_steps=1)
    assert "max_steps is 1, but the codebook starts after step 2" in caplog.text
