"""What the monitors write into TensorBoard's file, against the same by hand, image by image; on one rank and on two."""

import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from matplotlib.axes import Axes
from refusals import refused
from tiny_models import (
    CODES,
    GROUPS,
    SIZE,
    TOKENS,
    fit_ar,
    fit_tokenizer,
    make_ar,
    make_tokenizer,
    picture,
    write_images,
)
from tiny_training import ar_module, events, image_data, scalars, token_data, tokenizer_module, trainer
from torch.distributed.fsdp import fully_shard

from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.training import callbacks
from dar_lightning.training.callbacks import monitors, throughput
from dar_lightning.training.flops import step_flops
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.optim import OptimizerConfig

BATCH, EVERY, STEPS = 4, 2, 6
# An epoch of five batches has two whole steps of two. Loggers count steps from 0.
BATCHES = {1: 4, 3: 4, 5: 4}  # step that is logged -> batches since the last one
PEAK = 1e-4  # teraFLOP/s


def sharpen(tokenizer):
    """So that images have tokens of their own."""
    for parameter in tokenizer.encoder.parameters():
        parameter.data *= 2
    return tokenizer


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
    found = [getattr(callbacks, name)() for name in ("OptimizerMonitor", "CodebookMonitor", "Memory")]
    found += [callbacks.GroupLoss(gain_batches=1), callbacks.TokenInfluence(num_images=3), callbacks.Throughput(PEAK)]
    # In the middle of what is logged at last, and once before the start.
    options = dict(max_steps=STEPS, val_check_interval=10, check_val_every_n_epoch=None, num_sanity_val_steps=1)
    options |= dict(log_every_n_steps=EVERY, accumulate_grad_batches=2, gradient_clip_val=0.1)
    optimizer, adversarial = OptimizerConfig(lr=1e-3, warmup_steps=3), AdversarialLoss(channels=4, depth=1)
    module = tokenizer_module(optimizer=optimizer, adversarial=adversarial)
    sharpen(module.tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "perf_counter", lambda: spy.now)
        fit = trainer(callbacks.EMA(0.5), spy, *found, folder=folder, **options)
        fit.fit(module, image_data(images))
    return scalars(folder), spy


def windows(spy: Spy) -> dict[int, list]:
    """Step that is logged -> the batches since the last one."""
    left = iter(spy.batches)
    return {step: [next(left) for _ in range(count)] for step, count in BATCHES.items()}


def group_of(u: float) -> int:
    return min(math.floor(u * GROUPS + 0.5), GROUPS - 1)


def test_losses_and_codebook_of_all_batches(run):
    logged, spy = run
    assert list(logged["train/flow"]) == list(logged["train/loss"]) == list(BATCHES)
    for step, batches in windows(spy).items():
        first, second = (flow for *_, flow in batches[-2:])  # those of the step itself
        assert first != second
        assert logged["train/flow"][step] == pytest.approx((first + second) / 2, rel=1e-5)
        counts = Counter(torch.cat([codes.flatten() for _, codes, _, _ in batches]).tolist())
        total = sum(counts.values())
        assert total == len(batches) * BATCH * TOKENS
        entropy = -sum(n / total * math.log(n / total) for n in counts.values())
        assert logged["codebook/use"][step] == pytest.approx(len(counts) / CODES)
        assert logged["codebook/dead"][step] == pytest.approx(CODES - len(counts), abs=1e-4)
        assert logged["codebook/perplexity"][step] == pytest.approx(math.exp(entropy), rel=1e-4)
        found = {group: [] for group in range(GROUPS)}
        for u, _, flow_each, flow in batches:
            assert float(flow_each.mean()) == pytest.approx(flow, rel=1e-5)
            for time, value in zip(u.tolist(), flow_each.tolist(), strict=True):
                found[group_of(time)].append(value)
        for group, values in found.items():
            expected = pytest.approx(sum(values) / len(values), rel=1e-5) if values else None
            assert logged[f"groups/train_flow_{group}"].get(step) == expected


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


def test_speed_and_memory(run):
    """A batch takes a second."""
    logged, _ = run
    module = tokenizer_module(adversarial=AdversarialLoss(channels=4, depth=1))
    flops = step_flops(module, {"image": torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8)})
    expected = {"speed/images_per_second": BATCH, "data/images_per_second": BATCH, "speed/tflops": flops / 1e12}
    expected |= {"speed/tokens_per_second": BATCH * TOKENS, "speed/mfu": flops / (PEAK * 1e12)}
    for name, value in expected.items():
        assert logged[name] == pytest.approx(dict.fromkeys(BATCHES, value), rel=1e-4)
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))  # KiB
    assert 0.1 < max(logged["memory/host_peak"].values()) <= peak / 2**20
    refused("peak_tflops is 0", callbacks.Throughput, 0)


@pytest.mark.parametrize("kind", ["tokenizer", "ar"])
def test_layers_add_their_curves(kind, images, tokens, tmp_path):
    """Those of experiments/monitor. A CPU is in no table of peaks: no mfu. Of two Throughputs the last logs."""
    layer = Path(__file__).parents[3] / "experiments" / "monitor" / f"{kind}.yaml"
    command = fit_ar if kind == "ar" else fit_tokenizer
    words = command(*(tokens if kind == "ar" else images), tmp_path, max_steps=2, val_check_interval=2)
    words += [f"--config={layer}"]
    if kind == "ar":
        words += ["--trainer.callbacks+=dar_lightning.training.callbacks.Throughput", "--trainer.callbacks.flops=false"]
    main([str(word) for word in words])
    logged = scalars(tmp_path)
    found = {name.partition("/")[0] for name in logged if "/" in name}
    expected = {"train", "val", "optimizer", "speed", "data", "memory", "groups"}
    assert found == expected | ({"codebook"} if kind == "tokenizer" else set())
    speed = {"images_per_second", "tokens_per_second", *(["tflops"] if kind == "tokenizer" else [])}
    assert {name.partition("/")[2] for name in logged if name.startswith("speed/")} == speed


def by_hand(tokenizer, numbers: list[int]) -> dict[str, float]:
    """Means over these pictures, where the next one gives the other tokens; seeds are the numbers."""

    def pixels(codes, noise) -> np.ndarray:
        image = tokenizer.detokenize(codes[None], noise[None])[0]
        return ((image.clamp(-1, 1) + 1) * 127.5).round().numpy()

    found = {}
    originals = {number: np.array(picture(number), dtype=float).transpose(2, 0, 1) for number in numbers}
    codes = {n: tokenizer.tokenize(torch.tensor(image)[None].float() / 127.5 - 1)[0] for n, image in originals.items()}
    for number, following in zip(numbers, [*numbers[1:], numbers[0]], strict=True):
        generator = torch.Generator().manual_seed(number)
        noise, other_noise = (torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(2))
        own, photo, exchanged = pixels(codes[number], noise), originals[number], {}
        for group in (1, 2, 3):
            first = (group - 1) * TOKENS // GROUPS
            exchanged[group] = pixels(torch.cat([codes[number][:first], codes[following][first:]]), noise)
        pairs = {"own_tokens": (own, photo), "other_tokens": (exchanged[1], photo)}
        pairs["same_tokens"] = own, pixels(codes[number], other_noise)
        pairs |= {f"exchanged_from_group_{group}": (own, image) for group, image in exchanged.items()}
        for name, (one, two) in pairs.items():
            error = max(np.square(one - two).sum(), 1)  # identical ones count as if a single value differed by 1
            found.setdefault(f"val/psnr_{name}", []).append(10 * np.log10(255**2 * one.size / error))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_token_influence_in_validation(run, images):
    """Of the averaged weights, on the first three of the validation images; not while the codebook is bypassed."""
    logged, spy = run
    expected = by_hand(spy.validated, [0, 1, 2])
    found = {name: values.popitem()[1] for name, values in logged.items() if name.startswith("val/psnr")}
    assert found == pytest.approx(expected, abs=0.01)
    module = tokenizer_module()
    module.tokenizer.quantizer.bypass = True
    found = trainer(callbacks.TokenInfluence()).validate(module, image_data(images), verbose=False)[0]
    assert "val/flow" in found
    assert not [name for name in found if "psnr" in name]
    refused("num_images is 1: another image's tokens need 2 or more", callbacks.TokenInfluence, num_images=1)


class Logits(Callback):
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
    p = [[table[b, n, code] / table[b, n].sum() for n, code in enumerate(row)] for b, row in enumerate(codes.tolist())]
    return -np.log(np.array(p))


def test_loss_and_accuracy_by_position(tokens, tmp_path, monkeypatch):
    lines, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, values, **how: lines.append((how["label"], values)) or plot(axes, values, **how)
    )
    spy, position_loss = Logits(), callbacks.PositionLoss(4)
    options = dict(max_steps=4, log_every_n_steps=2, val_check_interval=4)
    trainer(spy, position_loss, folder=tmp_path, **options).fit(ar_module(), token_data(tokens))
    logged = scalars(tmp_path)

    for step in (1, 3):
        trained = np.concatenate([nats(logits, codes) for codes, logits in spy.batches[step - 1 : step + 1]]).mean(0)
        for group in range(4):
            expected = trained[2 * group : 2 * group + 2].mean()
            assert logged[f"groups/train_loss_{group}"][step] == pytest.approx(expected, rel=1e-4)
    model = make_ar()
    model.load_state_dict(spy.weights)
    everything = next(iter(token_data(tokens, 7).val_dataloader()))
    with torch.no_grad():
        logits = model(everything["label"], everything["codes"])
    loss = nats(logits, everything["codes"]).mean(0)
    hit = (logits.argmax(-1) == everything["codes"]).double().mean(0).numpy()
    for name, values in (("loss", loss), ("accuracy", hit)):
        for group in range(4):
            (value,) = logged[f"groups/val_{name}_{group}"].values()
            assert value == pytest.approx(values[2 * group : 2 * group + 2].mean(), rel=1e-4)
    assert logged["val/loss"].popitem()[1] == pytest.approx(loss.mean(), rel=1e-4)

    labels, values = zip(*lines, strict=True)
    assert labels == ("validation", "train", "validation")
    for found, expected in zip(values, (loss, trained, hit), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert [len(events(tmp_path).Images(f"{name}_by_position")) for name in ("loss", "accuracy")] == [1, 1]
    for groups in (0, 3):
        with pytest.raises(UserError, match=f"num_groups is {groups}: it must divide the {TOKENS} tokens"):
            trainer(callbacks.PositionLoss(groups), max_steps=1).fit(ar_module(), token_data(tokens))


class Keep(Callback):
    """What this rank trained on."""

    def __init__(self):
        self.seen = {"codes": [], "group": [], "flow_each": []}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, values in self.seen.items():
            values.append(outputs[name].numpy())


def monitored(images, sets: list[str], folder: Path) -> tuple[dict, list[dict]]:
    """What a rank trained on, and token influence of sets of images."""
    keep, found = Keep(), [callbacks.CodebookMonitor(), callbacks.GroupLoss(), callbacks.Throughput(flops=False)]
    ranks = dict(devices=2, strategy="ddp")
    options = dict(max_steps=3, log_every_n_steps=3, limit_val_batches=0)
    trainer(keep, *found, folder=folder, **ranks, **options).fit(tokenizer_module(), image_data(images, 3))
    module = tokenizer_module()
    sharpen(module.tokenizer)
    validating = [(trainer(callbacks.TokenInfluence(), **ranks), image_data((None, val), 3)) for val in sets]
    return keep.seen, [fit.validate(module, data, verbose=False)[0] for fit, data in validating]


@pytest.mark.slow
def test_curves_are_of_both_ranks(images, two_ranks, tmp_path):
    """Ranks take turns: of five images, one rank has three; of three, one rank has a single one, which says nothing."""
    sets = [write_images(tmp_path / f"val{count}", count) for count in (5, 3)]
    (first, (five, three)), (second, _) = two_ranks(monitored, images, sets, tmp_path)
    logged = scalars(tmp_path)
    both = {name: torch.from_numpy(np.concatenate([*first[name], *second[name]])) for name in first}
    assert (first["codes"][0] != second["codes"][0]).any()
    assert logged["codebook/dead"][2] == pytest.approx(CODES - len(both["codes"].unique()), abs=1e-4)
    step = np.concatenate([rank["flow_each"][-1] for rank in (first, second)])
    assert logged["train/flow"][2] == pytest.approx(float(step.mean()), rel=1e-5)
    for group in both["group"].unique().tolist():
        expected = float(both["flow_each"][both["group"] == group].mean())
        assert logged[f"groups/train_flow_{group}"][2] == pytest.approx(expected, rel=1e-5)
    images_per_second = logged["speed/images_per_second"][2]
    assert logged["speed/tokens_per_second"][2] == pytest.approx(images_per_second * TOKENS, rel=1e-5)
    tokenizer = sharpen(make_tokenizer())
    even, odd, expected = (by_hand(tokenizer, numbers) for numbers in ([0, 2, 4], [1, 3], [0, 2]))
    for name, value in expected.items():
        assert five[name] == pytest.approx((3 * even[name] + 2 * odd[name]) / 5, abs=0.01), name
        assert three[name] == pytest.approx(value, abs=0.01), name


def squared_logits(ar) -> torch.Tensor:
    codes = torch.arange(4 * TOKENS).view(4, TOKENS) * 7 % CODES
    return ar(torch.arange(4), codes).gather(2, codes[..., None]).square().mean()


def sharded_norm() -> dict[str, float]:
    ar, mesh, logged = make_ar(), dist.device_mesh.init_device_mesh("cpu", (2,)), {}
    for part in (*ar.blocks, ar):
        fully_shard(part, mesh=mesh)
    squared_logits(ar).backward()
    module = SimpleNamespace(named_children=lambda: [("ar", ar)], log_dict=logged.update)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monitors, "is_log_step", lambda trainer: True)
        callbacks.OptimizerMonitor().on_before_optimizer_step(None, module, SimpleNamespace(param_groups=[{"lr": 0.5}]))
    return {name: float(value) for name, value in logged.items()}


@pytest.mark.slow
def test_the_norm_of_a_sharded_gradient(two_ranks):
    squared_logits(whole := make_ar()).backward()
    expected = sum(float((p.grad.double() ** 2).sum()) for p in whole.parameters()) ** 0.5
    wanted = {"optimizer/grad_norm_ar": pytest.approx(expected, rel=1e-5), "optimizer/lr": 0.5}
    assert two_ranks(sharded_norm) == [wanted, wanted]
