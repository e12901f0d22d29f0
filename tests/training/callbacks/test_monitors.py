"""What the monitors write into TensorBoard's file, against the same by hand, image by image; on one rank and on two."""

import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from tiny_models import CODES, GROUPS, SIZE, TOKENS, fit_ar, fit_tokenizer, make_ar, make_tokenizer, random_codes
from tiny_training import image_data, scalars, tokenizer_module, trainer
from torch.distributed.fsdp import fully_shard

from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.training.callbacks import (
    EMA,
    CodebookMonitor,
    GroupLoss,
    Memory,
    OptimizerMonitor,
    Throughput,
    optimizer_monitor,
    throughput,
)
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.optim import OptimizerConfig

BATCH, EVERY, STEPS = 4, 2, 6
# An epoch of five batches has two whole steps of two. Loggers count steps from 0.
BATCHES = {1: 4, 3: 4, 5: 4}  # step that is logged -> batches since the last one
PEAK = 1e-4  # teraFLOP/s


class Spy(Callback):
    """Writes down what goes by, and lets a second pass for each training batch."""

    def __init__(self):
        self.batches, self.norms, self.now = [], [], 0.0

    def on_train_start(self, trainer, pl_module):
        losses = pl_module.tokenizer.training_losses

        def spied(images, u=None, noise=None):
            found = losses(images, u, noise)
            if pl_module.training:
                self.batches.append((u, found["codes"], found["flow_each"], float(found["flow"])))
            return found

        pl_module.tokenizer.training_losses = spied

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = {"tokenizer": 0.0, "adversarial": 0.0}
        for name, parameter in pl_module.named_parameters():
            squares[name.partition(".")[0]] += float((parameter.grad.double() ** 2).sum())
        self.norms.append({name: math.sqrt(value) for name, value in squares.items()})

    def on_train_batch_end(self, *_):
        self.now += 1.0

    def on_validation_end(self, *_):
        self.now += 100.0  # which counts as training's nowhere

    def on_validation_epoch_start(self, trainer, pl_module):  # after EMA has put its weights there
        self.validated = copy.deepcopy(make_tokenizer())
        self.validated.load_state_dict(pl_module.tokenizer.state_dict())


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> tuple[dict[str, dict[int, float]], Spy]:
    folder, spy = tmp_path_factory.mktemp("run"), Spy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "perf_counter", lambda: spy.now)
        monitors = [OptimizerMonitor(), CodebookMonitor(), GroupLoss(gain_batches=1), Memory(), Throughput(PEAK)]
        options = dict(max_steps=STEPS, val_check_interval=sum(BATCHES.values()), check_val_every_n_epoch=None)
        options |= dict(log_every_n_steps=EVERY, accumulate_grad_batches=2, gradient_clip_val=0.1)
        optimizer, adversarial = OptimizerConfig(lr=1e-3, warmup_steps=3), AdversarialLoss(channels=4, depth=1)
        fit = trainer(EMA(0.5), spy, *monitors, folder=folder, **options)
        fit.fit(tokenizer_module(optimizer=optimizer, adversarial=adversarial), image_data(images))
    return scalars(folder), spy


def windows(spy: Spy) -> dict[int, list]:
    """Step that is logged -> the batches since the last one."""
    left = iter(spy.batches)
    return {step: [next(left) for _ in range(count)] for step, count in BATCHES.items()}


def test_losses_are_of_all_batches_of_a_step(run):
    logged, spy = run
    assert list(logged["train/flow"]) == list(logged["train/loss"]) == list(BATCHES)
    for step, batches in windows(spy).items():
        first, second = (flow for *_, flow in batches[-2:])  # those of the step itself
        assert first != second
        assert logged["train/flow"][step] == pytest.approx((first + second) / 2, rel=1e-5)


def group_of(u: float) -> int:
    return min(math.floor(u * GROUPS + 0.5), GROUPS - 1)


def test_codebook(run):
    logged, spy = run
    for step, batches in windows(spy).items():
        counts = Counter(torch.cat([codes.flatten() for _, codes, _, _ in batches]).tolist())
        total = sum(counts.values())
        assert total == len(batches) * BATCH * TOKENS
        entropy = -sum(n / total * math.log(n / total) for n in counts.values())
        assert logged["codebook/use"][step] == pytest.approx(len(counts) / CODES)
        assert logged["codebook/dead"][step] == pytest.approx(CODES - len(counts), abs=1e-4)
        assert logged["codebook/perplexity"][step] == pytest.approx(math.exp(entropy), rel=1e-4)


def test_flow_by_group_in_training(run):
    logged, spy = run
    for step, batches in windows(spy).items():
        found = {group: [] for group in range(GROUPS)}
        for u, _, flow_each, flow in batches:
            assert float(flow_each.mean()) == pytest.approx(flow, rel=1e-5)
            for time, value in zip(u.tolist(), flow_each.tolist(), strict=True):
                found[group_of(time)].append(value)
        for group, values in found.items():
            curve = logged[f"groups/train_flow_{group}"]
            expected = pytest.approx(sum(values) / len(values), rel=1e-5) if values else None
            assert curve.get(step) == expected


def flow(tokenizer, image, codes, u, noise) -> float:
    """Squared error of the velocity, by hand."""
    window = [min(math.floor(u * GROUPS + 0.5) * (TOKENS // GROUPS), TOKENS - TOKENS // GROUPS) + i for i in range(2)]
    t, x1 = u / (u + 2.0 * (1 - u)), 0.6 * image
    cond = tokenizer.condition(codes[None])[:, window]
    velocity = tokenizer.decoder((t * x1 + (1 - t) * noise)[None], torch.tensor([t]), cond)[0]
    return float(((velocity - (x1 - noise)) ** 2).mean() / 0.6**2)


@torch.no_grad()
def test_flow_and_gain_by_group_in_validation(run, images):
    """Image by image, with the averaged weights; the gain on the first batch alone."""
    logged, spy = run
    flows, gains = ({group: [] for group in range(GROUPS)} for _ in range(2))
    for number, batch in enumerate(image_data(images).val_dataloader()):
        generator = torch.Generator().manual_seed(number)
        times = spy.validated.schedule.stratified_times(len(batch["image"]), generator)
        noise = torch.randn(batch["image"].shape, generator=generator)
        pixels = (batch["image"] / 127.5 - 1)[batch["valid"]]
        codes = spy.validated.tokenize(pixels)
        for i, image in enumerate(pixels):
            u, group = float(times[i]), group_of(float(times[i]))
            own = flow(spy.validated, image, codes[i], u, noise[i])
            flows[group].append(own)
            mixed = codes[i].clone()
            mixed[2 * group : 2 * group + 2] = codes[i - 1][2 * group : 2 * group + 2]
            if number == 0:
                gains[group].append(flow(spy.validated, image, mixed, u, noise[i]) - own)
    assert sum(map(len, flows.values())) == 7
    for name, found in (("flow", flows), ("gain", gains)):
        for group, values in found.items():
            if values:
                (value,) = logged[f"groups/val_{name}_{group}"].values()
                assert value == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-5)
    assert any(abs(value) > 1e-3 for values in gains.values() for value in values)


def test_learning_rate_and_gradients(run):
    logged, spy = run
    assert logged["optimizer/lr"] == pytest.approx({1: 1e-3 / 3, 3: 1e-3, 5: 1e-3})  # a warm-up of three steps
    for name in ("tokenizer", "adversarial"):
        by_hand = [spy.norms[step][name] for step in (1, 3, 5)]
        assert list(logged[f"optimizer/grad_norm_{name}"].values()) == pytest.approx(by_hand, rel=1e-4)
        assert max(by_hand) > 0.1, "before clipping"


def test_speed(run):
    """A batch takes a second."""
    logged, _ = run
    module = tokenizer_module(adversarial=AdversarialLoss(channels=4, depth=1))
    flops = step_flops(module, {"image": torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8)})
    assert list(logged["speed/mfu"]) == list(BATCHES)
    for step in BATCHES:
        assert logged["speed/images_per_second"][step] == logged["data/images_per_second"][step] == pytest.approx(BATCH)
        assert logged["speed/tokens_per_second"][step] == pytest.approx(BATCH * TOKENS)
        assert logged["speed/tflops"][step] == pytest.approx(flops / 1e12, rel=1e-4)
        assert logged["speed/mfu"][step] == pytest.approx(flops / (PEAK * 1e12), rel=1e-4)


def test_memory(run):
    """Between what torch alone takes and what this machine can have."""
    logged, _ = run
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))  # KiB
    assert 0.1 < max(logged["memory/host_peak"].values()) <= peak / 2**20


def test_what_a_cpu_and_another_module_can_tell(images, tmp_path):
    """A CPU is in no table of peaks: no mfu. Without FLOPs: speed alone."""
    fit = trainer(Throughput(), folder=tmp_path / "counted", max_steps=1, limit_val_batches=0)
    fit.fit(tokenizer_module(), image_data(images))
    plain = trainer(Throughput(flops=False), folder=tmp_path / "plain", max_steps=1, limit_val_batches=0)
    plain.fit(tokenizer_module(), image_data(images))
    counted, speed = scalars(tmp_path / "counted"), scalars(tmp_path / "plain")
    assert counted["speed/tflops"][0] > 0
    assert "speed/mfu" not in counted
    assert counted.keys() - speed.keys() == {"speed/tflops"}
    with pytest.raises(UserError, match="peak_tflops is 0"):
        Throughput(0)


@pytest.mark.parametrize("kind", ["tokenizer", "ar"])
def test_layers_add_their_curves(kind, images, tokens, tmp_path):
    """Those of experiments/monitor."""
    layer = Path(__file__).parents[3] / "experiments" / "monitor" / f"{kind}.yaml"
    command = fit_ar if kind == "ar" else fit_tokenizer
    words = command(*(tokens if kind == "ar" else images), tmp_path, max_steps=2, val_check_interval=2)
    main([str(word) for word in (*words, f"--config={layer}")])
    found = {name.partition("/")[0] for name in scalars(tmp_path) if "/" in name}
    expected = {"train", "val", "optimizer", "speed", "data", "memory", "groups"}
    assert found == expected | ({"codebook"} if kind == "tokenizer" else set())


# ---- two ranks


class Keep(Callback):
    """What this rank trained on."""

    def __init__(self):
        self.seen = {"codes": [], "group": [], "flow_each": []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, values in self.seen.items():
            values.append(outputs[name].numpy())


def monitored(images, folder: Path) -> dict:
    keep, monitors = Keep(), [CodebookMonitor(), GroupLoss(), OptimizerMonitor(), Throughput(peak_tflops=1)]
    options = dict(devices=2, strategy="ddp", max_steps=3, log_every_n_steps=3)
    trainer(keep, *monitors, folder=folder, **options).fit(tokenizer_module(), image_data(images, 3))
    return keep.seen


@pytest.mark.slow
def test_curves_are_of_both_ranks(images, two_ranks, tmp_path):
    ranks, logged = two_ranks(monitored, images, tmp_path), scalars(tmp_path)
    ranks = [{name: [torch.from_numpy(one) for one in values] for name, values in rank.items()} for rank in ranks]
    both = {name: torch.cat([*ranks[0][name], *ranks[1][name]]) for name in ranks[0]}
    assert not torch.equal(ranks[0]["codes"][0], ranks[1]["codes"][0])
    assert logged["codebook/dead"][2] == pytest.approx(CODES - len(both["codes"].unique()), abs=1e-4)
    step = torch.cat([rank["flow_each"][-1] for rank in ranks])
    assert logged["train/flow"][2] == pytest.approx(float(step.mean()), rel=1e-5)
    for group in both["group"].unique().tolist():
        expected = float(both["flow_each"][both["group"] == group].mean())
        assert logged[f"groups/train_flow_{group}"][2] == pytest.approx(expected, rel=1e-5)
    images_per_second = logged["speed/images_per_second"][2]
    assert logged["speed/tokens_per_second"][2] == pytest.approx(images_per_second * TOKENS, rel=1e-5)
    assert logged["speed/mfu"][2] == pytest.approx(logged["speed/tflops"][2], rel=1e-5)


def sharded_norm() -> dict[str, float]:
    ar, mesh, logged = make_ar(), dist.device_mesh.init_device_mesh("cpu", (2,)), {}
    for part in (*ar.blocks, ar):
        fully_shard(part, mesh=mesh)
    codes = torch.from_numpy(random_codes(4))
    ar(torch.arange(4), codes).gather(2, codes[..., None]).square().mean().backward()
    module = SimpleNamespace(named_children=lambda: [("ar", ar)], log_dict=logged.update)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_monitor, "is_log_step", lambda trainer: True)
        OptimizerMonitor().on_before_optimizer_step(None, module, SimpleNamespace(param_groups=[{"lr": 0.5}]))
    return {name: float(value) for name, value in logged.items()}


@pytest.mark.slow
def test_the_norm_of_a_sharded_gradient(two_ranks):
    whole, codes = make_ar(), torch.from_numpy(random_codes(4))
    whole(torch.arange(4), codes).gather(2, codes[..., None]).square().mean().backward()
    expected = sum(float((p.grad.double() ** 2).sum()) for p in whole.parameters()) ** 0.5
    wanted = {"optimizer/grad_norm_ar": pytest.approx(expected, rel=1e-5), "optimizer/lr": 0.5}
    assert two_ranks(sharded_norm) == [wanted, wanted]
