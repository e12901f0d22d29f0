"""Runs of `dar fit` whose data and random draws are those of a training golden, and how far they end from it."""

import json
from pathlib import Path
from unittest import mock

import pandas
import torch
from lightning.pytorch import Callback, LightningDataModule
from official import numbers, tensors
from tiny_models import options
from torch import Tensor
from torch.utils.data import DataLoader

from dar_lightning.commands.fit import TrainerCLI
from dar_lightning.weights import load_official_ar, load_official_tokenizer
from dar_lightning.weights.lightning import load_lightning_checkpoint
from dar_lightning.weights.official import AR_NAMES, TOKENIZER_NAMES, official_name

STEPS = 12
OURS = "--trainer.callbacks+=dar_lightning.training.callbacks"


class Batches(LightningDataModule):
    """The batches that a golden was trained on, as a loader gives them: images as pixels, tokens with their labels."""

    def __init__(self, golden: str):
        super().__init__()
        self.inputs = tensors(golden, "inputs")

    def train_dataloader(self) -> DataLoader:
        if "images" in self.inputs:
            pixels = ((self.inputs["images"].double() + 1) * 127.5).float()
            batches = [{"image": pixels[step % len(pixels)]} for step in range(STEPS)]
        else:
            pairs = zip(self.inputs["tokens"].long(), self.inputs["labels"].long(), strict=True)
            batches = [{"codes": codes, "label": labels} for codes, labels in pairs]
        return DataLoader(batches, batch_size=None)


class Draws(Callback):
    """Lets torch draw what the golden drew, exactly once a step, and keeps the codes that the module chose."""

    def __init__(self, golden: str):
        inputs = tensors(golden, "inputs")
        if "u" in inputs:
            noise = inputs["noise"]
            self.draws = {"rand": inputs["u"], "randn_like": torch.stack([noise[s % len(noise)] for s in range(STEPS)])}
        else:
            self.draws = {"rand": inputs["class_drop_u"]}
        self.codes: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.patches = [
            mock.patch.object(torch, name, return_value=values[batch_idx]) for name, values in self.draws.items()
        ]
        self.mocks = [patch.start() for patch in self.patches]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for patch in self.patches:
            patch.stop()
        assert [mocked.call_count for mocked in self.mocks] == [1] * len(self.mocks)
        self.codes.append(outputs.get("codes"))


def run(part: str, folder: Path) -> dict[str, float]:
    """Train a golden; the largest deviation of each quantity, relative to it or to what training changed.

    Start weights come as init_from, and the rest as in experiments/.

    Args:
        part: tokenizer or ar.
        folder: for the start weights and the run's files, empty.
    """
    golden = f"train_{part}"
    config, start = numbers(golden, "config"), tensors(golden, "start")
    if part == "tokenizer":
        for name in config["tables"]["names"]:
            table = start[name]
            start[name] = torch.cat([table, table.new_zeros(config["tables"]["rows"] - len(table), table.shape[1])])
        model = load_official_tokenizer(start, {"model": config["model"]})
        optimizer = {"lr": 2e-4, "betas": "[0.9,0.95]", "warmup_steps": 4}
        words = ["--model=dar_lightning.training.TokenizerModule", f"{OURS}.EMA", "--trainer.callbacks.decay=0.999"]
        losses, rules = ("flow", "vq", "commit"), TOKENIZER_NAMES
        ends = [("weights", "final"), ("average", "final_ema")]
    else:
        model = load_official_ar(start, config["model"])
        optimizer = {"lr": 4e-4, "betas": "[0.9,0.95]", "weight_decay": 0.05, "decay_steps": 8, "final_lr": 1e-5}
        words = ["--model=dar_lightning.training.ARModule"]
        losses, rules, ends = ("loss",), AR_NAMES, [("weights", "final")]
    model.save_pretrained(folder / "start")
    trainer = dict(accelerator="cpu", devices=1, max_steps=STEPS, gradient_clip_val=1.0, log_every_n_steps=1)
    trainer |= dict(default_root_dir=folder / "run", enable_progress_bar="false", enable_model_summary="false")
    trainer |= {"logger": "CSVLogger", "logger.save_dir": folder, "logger.name": "", "logger.version": "logs"}
    saving = ["--trainer.callbacks.every_n_train_steps=12", "--trainer.callbacks.save_last=true"]
    cli = TrainerCLI(
        [
            *("fit", "--seed_everything=0", *options("trainer", trainer), *words),
            *options("model.init_args.optimizer", optimizer),
            *(f"{OURS}.LastStepCheckpoint", *saving, f"{OURS}.SkipBadSteps", f"{OURS}.OptimizerMonitor"),
            *("--trainer.callbacks+=golden_training.Draws", f"--trainer.callbacks.golden={golden}"),
            *("--data=golden_training.Batches", f"--data.init_args.golden={golden}"),
            f"--model.init_args.config={json.dumps(model.config.to_dict())}",
            f"--model.init_args.init_from={folder / 'start'}",
        ]
    )
    logged = pandas.read_csv(folder / "logs" / "metrics.csv").groupby("step").first()
    curves = {name: f"train/{name}" for name in losses}
    curves |= {"lr": "optimizer/lr", "grad_norm": f"optimizer/grad_norm_{part}"}
    steps = numbers(golden, "steps")["steps"]
    found = {name: worst(logged[curve], [step[name] for step in steps]) for name, curve in curves.items()}
    if part == "tokenizer":
        (draws,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Draws))
        pairs = zip(draws.codes, tensors(golden, "inputs")["codes"], strict=True)
        found["codes"] = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
    for what, file in ends:
        state = load_lightning_checkpoint(
            folder / "run" / "checkpoints" / "last.ckpt", "raw" if what == "weights" else "ema"
        ).state_dict()
        ours = {official_name(name, rules): tensor for name, tensor in state.items()}
        skip = config.get("rounding_noise", ())
        expected = {name: tensor for name, tensor in tensors(golden, file).items() if name not in skip}
        found[what] = change(ours, start, expected)
    return found


def worst(found, expected) -> float:
    """The largest deviation of a step, as a part of the largest value."""
    found, expected = torch.tensor(list(found), dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    return float((found - expected).abs().max() / expected.abs().max())


def change(ours: dict[str, Tensor], start: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|ours - golden| / |golden - start| over all tensors."""
    off, moved = 0.0, 0.0
    for name, tensor in expected.items():
        rows = slice(len(tensor))  # of the two tables that a golden stores the beginning of
        off += float((ours[name][rows].flatten() - tensor.flatten()).double().square().sum())
        moved += float((tensor.flatten() - start[name][rows].flatten()).double().square().sum())
    return (off / moved) ** 0.5
