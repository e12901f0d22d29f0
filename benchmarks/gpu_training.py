"""Items of `benchmarks.gpu` that train: FID over NCCL, a step's speed and waits, FSDP2, a loss that falls."""

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import timm
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils import clip_grad_norm_

from benchmarks.gpu_bench import Bench
from benchmarks.machine import RESULTS, ROOT
from benchmarks.tiny import AR, TOKENIZER, make_tokenizer, write_images, write_tokens, write_vgg
from benchmarks.traffic import PEAK, PRODUCTS, STREAMED
from dar_lightning import ARConfig, TokenizerConfig
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.training import ARModule, FSDP2Strategy, TokenizerModule
from dar_lightning.training.callbacks import GenerationFID, ReconstructionFID
from dar_lightning.training.checkpoint_io import SafeCheckpointIO
from dar_lightning.training.losses import PerceptualLoss, RepaLoss

WISHED = 0.45  # MFU that is wished for, more than memory allows
REACHED = 0.9  # of what it allows, the goal of compiled training
# Of a sample in a step: tests/test_counts.py, training/test_flops.py. v1 is without its frozen networks, as the memory
# traffic of it is counted.
FLOPS = {"v1": 1294e9, "B": 153e9, "XL": 1174e9}
FROZEN = 1461e9  # of v1 with them
PHOTOS = ROOT / "data" / "fruit64" / "train"


def trainer(bench: Bench, *callbacks: Callback, **options) -> Trainer:
    """On the one device, quiet."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= dict(num_sanity_val_steps=0, default_root_dir=bench.folder)
    place = dict(accelerator="gpu" if bench.on_gpu else "cpu", devices=1)
    return Trainer(callbacks=list(callbacks), **place | quiet | options)


@contextmanager
def one_rank(bench: Bench) -> Iterator[None]:
    """A process group of this process alone, by NCCL on a GPU."""
    group = dict(rank=0, world_size=1, store=dist.HashStore())
    dist.init_process_group("nccl" if bench.on_gpu else "gloo", **group)
    try:
        yield
    finally:
        dist.destroy_process_group()


def frechet(bench: Bench) -> Iterator[dict]:
    """Both FID callbacks in a validation whose metrics are reduced."""
    images, tokens = write_images(bench.folder / "images", 6), write_tokens(bench.folder / "tokens", 6)
    make_tokenizer().save_pretrained(bench.folder / "tokenizer")
    generated = GenerationFID(str(bench.folder / "tokenizer"), images, 4, "color_edges", batch_size=2)
    runs = {
        "val/rFD-color_edges": (
            ReconstructionFID(6, "color_edges"),
            TokenizerModule(TokenizerConfig(**TOKENIZER)),
            ImageNetDataModule(images, images, image_size=TOKENIZER["image_size"], batch_size=3),
        ),
        "val/gFD-color_edges": (
            generated,
            ARModule(ARConfig(**AR)),
            CodesDataModule(tokens, tokens, batch_size=3),
        ),
    }
    for name, (callback, module, data) in runs.items():
        with one_rank(bench):
            (found,) = trainer(bench, callback, strategy="ddp").validate(module, data, verbose=False)
        yield bench.row(f"{name} is reduced", found[name], at_least=0.0, is_speed=False)


def training_step(bench: Bench, module: LightningModule, batch: dict) -> Callable[[], None]:
    """Forward pass under autocast, backward pass, clipping and AdamW, as a recipe has them."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = module.training_step(batch, 1)["loss"]
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def allowed_mfu(bench: Bench, name: str) -> float | None:
    """Share of the device's peak that the counted traffic of a compiled step allows, as in `benchmarks.traffic`."""
    counted = {row["model"]: row for row in json.loads((RESULTS / "traffic.json").read_text())["rows"]}[name]
    floor = bench.milliseconds_of(flops=counted["batch"] * FLOPS[name])
    if floor is None:
        return None
    traffic = bench.milliseconds_of(read=1e9 * counted["gigabytes_outside_products"])
    return floor / (floor * PEAK / PRODUCTS + traffic * 0.9 / STREAMED)  # the bench's memory is at nine tenths


def speed_of_steps(
    bench: Bench,
    name: str,
    build: Callable[[bool], LightningModule],
    batch: dict,
    ways: tuple[bool, ...] = (False, True),
    frozen: bool = False,
) -> Iterator[dict]:
    """Uncompiled and compiled steps of a batch, against products at the device's peak; what makes the host wait."""
    batch = {key: tensor.to(bench.device) for key, tensor in batch.items()}
    count, flops = len(batch["label"]), FROZEN if frozen else FLOPS[name]
    allowed = None if frozen else allowed_mfu(bench, name)
    for compiled in ways:
        torch.manual_seed(0)
        with torch.device(bench.device):
            module = build(compiled).train()
        module.to(bench.device)
        step, floor = training_step(bench, module, batch), bench.milliseconds_of(flops=count * flops)
        facts = {"first_call_seconds": bench.first_seconds(step), "kernels": bench.kernels(step)}
        waits, facts["peak_memory_mb"] = bench.waits(step), bench.memory(step)
        taken = bench.milliseconds(step)
        facts |= {"mfu": floor and floor / taken, "samples_per_second": 1e3 * count / taken}
        facts |= {"mfu_allowed": allowed, "mfu_wished": WISHED}
        goal = 1 / (REACHED * allowed) if compiled and allowed else None
        how = ("compiled" if compiled else "uncompiled") + (", with frozen networks" if frozen else "")
        yield bench.row(f"{name} at {count}, {how}", taken, "ms", floor, at_most=goal, **facts)
        yield bench.row(f"{name}, {how}: waits of the host in a step", waits, at_most=0)
        del module, step
        bench.drop()


def tokenizer(bench: Bench) -> Iterator[dict]:
    """v1, and with LPIPS and REPA, of random weights; a rehearsal leaves LPIPS out, whose network is large."""
    make, random = timm.create_model, {"pretrained": False} | bench.size({}, {"depth": 1})
    with mock.patch.object(timm, "create_model", lambda *names, **options: make(*names, **options | random)):
        losses = {"repa": RepaLoss()}
    if bench.full:
        losses["perceptual"] = PerceptualLoss(weights_path=str(write_vgg(bench.folder / "vgg16.pth")))
    config = bench.size(TokenizerConfig.preset("v1"), TokenizerConfig(**TOKENIZER | {"repa_layer": 0}))
    count, side = bench.size(16, 1), config.image_size
    batch = {"image": torch.randint(256, (count, 3, side, side), dtype=torch.uint8)}
    batch["label"] = torch.zeros(count, dtype=torch.long)
    yield from speed_of_steps(bench, "v1", lambda compiled: TokenizerModule(config, compile=compiled), batch)
    yield from speed_of_steps(
        bench, "v1", lambda compiled: TokenizerModule(config, compile=compiled, **losses), batch, (True,), frozen=True
    )


def ar(bench: Bench) -> Iterator[dict]:
    """The AR models at the batch sizes of their recipes."""
    for size, count in (("B", 64), ("XL", 32)):
        config = bench.size(ARConfig.preset(size), ARConfig(**AR))
        codes = torch.randint(config.vocab_size, (bench.size(count, 2), config.num_tokens))
        batch = {"codes": codes, "label": torch.zeros(len(codes), dtype=torch.long)}
        yield from speed_of_steps(bench, size, lambda compiled, c=config: ARModule(c, compile=compiled), batch)


def sharded(bench: Bench) -> Iterator[dict]:
    """FSDP2 on one rank: steps with clipping, and a checkpoint that comes back as it was."""
    tokens = write_tokens(bench.folder / "tokens", 8)
    saved = []
    with one_rank(bench):
        for steps in (2, 3):
            torch.manual_seed(0)
            module, path = ARModule(ARConfig(**AR)), bench.folder / f"{steps}.ckpt"
            options = dict(strategy=FSDP2Strategy(), precision="bf16-mixed", gradient_clip_val=1.0, max_steps=steps)
            fit = trainer(bench, _SaveAtStart(bench.folder / "again.ckpt"), limit_val_batches=0, **options)
            fit.strategy.checkpoint_io = SafeCheckpointIO(module)
            fit.fit(module, CodesDataModule(tokens, tokens, batch_size=4), ckpt_path=saved[0] if saved else None)
            fit.save_checkpoint(path)
            saved.append(path)
    before, after, last = (torch.load(p, weights_only=True) for p in (saved[0], bench.folder / "again.ckpt", saved[1]))
    off = max(_difference(before["state_dict"], after["state_dict"]), _difference(*map(_moments, (before, after))))
    yield bench.row("difference of a checkpoint that is read and written", off, at_most=0, is_speed=False)
    moved = _difference(before["state_dict"], last["state_dict"])
    yield bench.row("a step after it moves the weights", moved, at_least=1e-9, is_speed=False)


class _SaveAtStart(Callback):
    """Writes what a run starts from, before its first step."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def _moments(checkpoint: dict) -> dict:
    """AdamW's state by parameter and name."""
    states = checkpoint["optimizer_states"][0]["state"]
    return {(number, name): value for number, state in states.items() for name, value in state.items()}


def _difference(one: dict, other: dict) -> float:
    """The largest between tensors of the same names."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


class _Losses(Callback):
    """The loss of every step, read at the end."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(outputs["loss"].detach())


def falls(bench: Bench) -> Iterator[dict]:
    """100 steps of v1's light size on the embedded photos."""
    light = TokenizerConfig.preset("light").to_dict() | {"image_size": 64, "repa_layer": None}
    module = TokenizerModule(TokenizerConfig(**bench.size(light, TOKENIZER)))
    side = module.tokenizer.config.image_size
    data = ImageNetDataModule(str(PHOTOS), image_size=side, batch_size=bench.size(32, 2), num_workers=0)
    losses, steps = _Losses(), bench.size(100, 4)
    options = dict(precision="bf16-mixed", gradient_clip_val=1.0, max_steps=steps, limit_val_batches=0)
    trainer(bench, losses, **options).fit(module, data)
    found = torch.stack(losses.found).float().tolist()
    fewest = max(steps // 10, 1)
    first, last = statistics.mean(found[:fewest]), statistics.mean(found[-fewest:])
    finite = all(map(torch.isfinite, torch.tensor(found)))
    yield bench.row("losses are finite", float(finite), at_least=1, is_speed=False)
    yield bench.row(f"loss after {steps} steps (floor: at the start)", last, floor=first, at_most=0.9)
