"""What the tokenizer's monitors write into TensorBoard's file, against the same by hand, image by image."""

import copy
import math
from collections import Counter

import pytest
import torch
from event_file import scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_models import CODES, GROUPS, SIZE, TOKENIZER, TOKENS, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import (
    CodebookMonitor,
    GroupLoss,
    Memory,
    OptimizerMonitor,
    Throughput,
    throughput,
)
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.optim import OptimizerConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
BATCH, EVERY, STEPS = 4, 2, 6
# An epoch of five batches has two whole steps of two. Loggers count steps from 0.
BATCHES = {1: 4, 3: 4, 5: 4}  # step that is logged -> batches since the last one
PEAK = 1e-4  # teraFLOP/s


def make_module(**options) -> TokenizerModule:
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=3)
    module = TokenizerModule(TokenizerConfig(**TOKENIZER), optimizer, **options)
    module.tokenizer.load_state_dict(make_tokenizer().state_dict())
    return module


class Spy(Callback):
    """Writes down what goes by, and lets a second pass for each training batch."""

    def __init__(self):
        self.batches, self.norms, self.now = [], [], 0.0

    def clock(self) -> float:
        return self.now

    def on_train_start(self, trainer, pl_module):
        losses = pl_module.tokenizer.training_losses

        def spied(images, u=None, noise=None):
            if not pl_module.training:
                return losses(images, u, noise)
            found = losses(images, u, noise)
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
        patch.setattr(throughput, "perf_counter", spy.clock)
        monitors = [OptimizerMonitor(), CodebookMonitor(), GroupLoss(gain_batches=1), Memory(), Throughput(PEAK)]
        callbacks = [EMAWeightAveraging(decay=0.5, use_buffers=False), spy, *monitors]
        options = dict(max_steps=STEPS, val_check_interval=sum(BATCHES.values()), check_val_every_n_epoch=None)
        options |= dict(log_every_n_steps=EVERY, accumulate_grad_batches=2, gradient_clip_val=0.1)
        fit = trainer(folder, callbacks, **options)
        module = make_module(adversarial=AdversarialLoss(channels=4, depth=1))
        fit.fit(module, datamodule=ImageNetDataModule(*images, image_size=SIZE, batch_size=BATCH))
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
    assert list(logged["codebook/use"]) == [1, 3, 5]


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
            if values:
                assert curve[step] == pytest.approx(sum(values) / len(values), rel=1e-5)
            else:
                assert step not in curve


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
    data = ImageNetDataModule(*images, image_size=SIZE, batch_size=BATCH)
    for number, batch in enumerate(data.val_dataloader()):
        generator = torch.Generator().manual_seed(number)
        times = spy.validated.schedule.sample_time(len(batch["image"]), "stratified", generator)
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
    assert list(logged["optimizer/lr"]) == [1, 3, 5]
    assert list(logged["optimizer/lr"].values()) == pytest.approx([1e-3 / 3, 1e-3, 1e-3])  # warm-up: 0, 1/3, 2/3, 1
    for name in ("tokenizer", "adversarial"):
        by_hand = [spy.norms[step][name] for step in (1, 3, 5)]
        assert list(logged[f"optimizer/grad_norm_{name}"].values()) == pytest.approx(by_hand, rel=1e-4)
        assert max(by_hand) > 0.1, "before clipping"


def test_speed(run):
    """A batch takes a second."""
    logged, _ = run
    module = make_module(adversarial=AdversarialLoss(channels=4, depth=1))
    flops = step_flops(module, {"image": torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8)})
    assert list(logged["speed/mfu"]) == list(BATCHES)
    for step in BATCHES:
        assert logged["speed/images_per_second"][step] == pytest.approx(BATCH)
        assert logged["speed/tokens_per_second"][step] == pytest.approx(BATCH * TOKENS)
        assert logged["speed/tflops"][step] == pytest.approx(flops / 1e12, rel=1e-4)
        assert logged["speed/mfu"][step] == pytest.approx(flops / (PEAK * 1e12), rel=1e-4)


def test_memory(run):
    """Between what torch alone takes and what this machine can have."""
    logged, _ = run
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))  # KiB
    assert 0.1 < max(logged["memory/host_peak"].values()) <= peak / 2**20


class Syncs(TorchDispatchMode):
    """Counts what would wait for a GPU, by the training step in which it happens."""

    WAITING = ("_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.step, self.found = None, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.step is not None and function.overloadpacket.__name__ in self.WAITING:
            self.found[self.step] += 1
        return function(*args, **(kwargs or {}))


class Steps(Callback):
    def __init__(self, syncs: Syncs):
        self.syncs = syncs

    def on_train_batch_start(self, trainer, *_):
        self.syncs.step = trainer.global_step

    def on_validation_start(self, *_):
        self.syncs.step = None


def test_no_wait_for_the_device_but_where_it_is_logged(images, tmp_path):
    syncs = Syncs()
    monitors = [OptimizerMonitor(), CodebookMonitor(), GroupLoss(), Memory()]
    fit = trainer(tmp_path, [Steps(syncs), *monitors], max_steps=4, log_every_n_steps=2, limit_val_batches=0)
    module = make_module()
    with syncs:
        fit.fit(module, datamodule=ImageNetDataModule(*images, image_size=SIZE, batch_size=BATCH))
    assert set(syncs.found) == {1, 3}


def test_no_peak_no_share(images, tmp_path):
    """A CPU is in no table: speed is logged, utilisation is not."""
    fit = trainer(tmp_path, [Throughput()], max_steps=1, log_every_n_steps=1, limit_val_batches=0)
    fit.fit(make_module(), datamodule=ImageNetDataModule(*images, image_size=SIZE, batch_size=BATCH))
    logged = scalars(tmp_path)
    assert logged["speed/tflops"][0] > 0
    assert "speed/mfu" not in logged
    with pytest.raises(UserError, match="peak_tflops is 0"):
        Throughput(0)
