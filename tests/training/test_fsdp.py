"""Sharded training on two ranks: DDP's numbers, from slices, with checkpoints that one device reads."""

import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from killable import run
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import AR, fit_ar, fit_tokenizer, make_tokenizer

from dar_lightning.ar.model import ARModel
from dar_lightning.cli import main
from dar_lightning.training.sharding import own_slice

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LAYER = f"--config={Path(__file__).parents[2] / 'experiments' / 'trainer' / 'fsdp.yaml'}"
STILL = dict.fromkeys(("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout"), 0.0)


class HoldsHalf(Callback):
    """Fails where a rank has more than its half of the weights, their average or the optimizer's state."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        (average,) = [callback._average_model for callback in trainer.callbacks if hasattr(callback, "_average_model")]
        state = [value for values in trainer.optimizers[0].state.values() for value in values.values() if value.ndim]
        weights = list(pl_module.ar.parameters())
        for tensors, times in ((weights, 1), (list(average.module.parameters()), 1), (state, 2)):
            assert len(tensors) == times * len(weights)
            held = sum(own_slice(tensor).numel() for tensor in tensors)
            assert abs(held / sum(tensor.numel() for tensor in tensors) - 0.5) < 0.01


class BadGradient(Callback):
    """One number that is none, in the last rank's slice of one gradient of the second step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1 and trainer.global_rank == 1:
            own_slice(pl_module.ar.head.weight.grad)[0, 0] = torch.nan


class Unchanged(Callback):
    """Fails if the second step changes this rank's slice of a weight."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = own_slice(pl_module.ar.head.weight).clone()

    def on_train_batch_end(self, trainer, pl_module, *args):
        same = torch.equal(self.before, own_slice(pl_module.ar.head.weight))
        assert same == (trainer.global_step == 2)


class Compiled(Callback):
    """Fails unless something was."""

    def on_train_end(self, trainer, pl_module):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.fixture(scope="module")
def command(images, tokens, tmp_path_factory):
    """Folder, strategy, steps and devices -> arguments of `dar`, with all that reads or writes weights."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(tokenizer)

    def arguments(folder: Path, strategy: str, steps: int, *more: str, devices: int = 2) -> list[str]:
        trainer = dict(devices=devices, max_steps=steps, val_check_interval=2, gradient_clip_val=0.05)
        layer = [LAYER, f"--trainer.callbacks+={__name__}.HoldsHalf"] if strategy == "fsdp" else []
        words = [
            *fit_ar(*tokens, folder, **trainer, strategy="ddp" if devices > 1 else "auto"),
            f"--model.init_args.config={json.dumps(AR | STILL)}",
            f"--data.init_args.batch_size={4 // devices}",
            "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
            "--trainer.callbacks.every_n_train_steps=2",
            *("--trainer.callbacks+=dar_lightning.training.callbacks.EMA", "--trainer.callbacks.decay=0.7"),
            *(
                "--trainer.callbacks+=dar_lightning.training.callbacks.Samples",
                f"--trainer.callbacks.tokenizer={tokenizer}",
            ),
            "--trainer.callbacks+=dar_lightning.training.callbacks.GenerationFID",  # of three batches: rank 0 draws two
            *(f"--trainer.callbacks.tokenizer={tokenizer}", f"--trainer.callbacks.reference={images[1]}"),
            *("--trainer.callbacks.features=color_edges", "--trainer.callbacks.num_samples=5"),
            *("--trainer.callbacks.batch_size=2", "--trainer.callbacks.every_n_steps=4"),
            "--trainer.callbacks+=dar_lightning.training.callbacks.SkipBadSteps",
            *("--ckpt_path=last", "--model.init_args.optimizer.lr=0.01", *layer, *more),
        ]
        return [str(word) for word in words]

    return arguments


@pytest.fixture(scope="module")
def whole_run(command, tmp_path_factory) -> Path:
    """Six sharded steps."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(main, command(folder, "fsdp", 6), world=2) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def broken_run(command, tmp_path_factory) -> Path:
    """The first four of them."""
    folder = tmp_path_factory.mktemp("broken")
    assert run(main, command(folder, "fsdp", 4), world=2) == [0, 0]
    return folder


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt")


def largest_difference(folder: Path, other: Path) -> float:
    """Of two checkpoints' tensors, relative to each tensor's size; they must hold the same things."""
    one, two = last(folder), last(other)
    assert one.keys() == two.keys()
    assert one["global_step"] == two["global_step"]
    states = [[state["optimizer_states"][0]["state"][i] for i in range(18)] for state in (one, two)]
    pairs = list(zip(*states, strict=True))
    pairs += [(one[key], two[key]) for key in ("state_dict", "current_model_state", "averaging_state")]
    differences = []
    for first, second in pairs:
        assert first.keys() == second.keys()
        assert {type(tensor) for tensor in first.values()} == {torch.Tensor}
        for name, tensor in first.items():
            differences.append(float((second[name] - tensor).abs().max() / tensor.abs().max()))
    return max(differences)


def drawn(folder: Path) -> np.ndarray:
    """The last picture of Samples, in [0, 255]."""
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return np.asarray(Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string)), dtype=float)


def measured(folder: Path) -> float:
    """What GenerationFID has written."""
    (file,) = (folder / "evaluation").iterdir()
    return json.loads(file.read_text())["metrics"]["gFD-color_edges"]


def test_the_numbers_are_those_of_ddp(command, whole_run, tmp_path):
    assert run(main, command(tmp_path, "ddp", 6), world=2) == [0, 0]
    assert largest_difference(tmp_path, whole_run) < 1e-4
    assert np.abs(drawn(tmp_path) - drawn(whole_run)).max() <= 1
    assert measured(tmp_path) == pytest.approx(measured(whole_run), rel=0.01)
    parameters = [group["params"] for group in last(whole_run)["optimizer_states"][0]["param_groups"]]
    assert parameters == [group["params"] for group in last(tmp_path)["optimizer_states"][0]["param_groups"]]


def test_resuming_changes_no_bit(command, whole_run, broken_run, tmp_path):
    first = broken_run / "checkpoints" / "last.ckpt"
    assert run(main, command(tmp_path, "fsdp", 6, f"--ckpt_path={first}"), world=2) == [0, 0]
    assert largest_difference(tmp_path, whole_run) == 0


def test_one_device_goes_on_from_two(command, whole_run, broken_run, tmp_path):
    first = broken_run / "checkpoints" / "last.ckpt"
    main(command(tmp_path, "auto", 6, f"--ckpt_path={first}", devices=1))
    assert largest_difference(tmp_path, whole_run) < 1e-4


def test_a_bad_gradient_in_one_slice_skips_the_step_on_all_ranks(command, tmp_path):
    more = [f"--trainer.callbacks+={__name__}.{name}" for name in ("BadGradient", "Unchanged")]
    assert run(main, command(tmp_path, "fsdp", 3, *more), world=2) == [0, 0]
    (counts,) = [state["counts"] for name, state in last(tmp_path)["callbacks"].items() if "SkipBadSteps" in name]
    assert counts.tolist() == [1, 0]


def test_export(whole_run, tmp_path):
    main(["export", f"--ckpt={whole_run / 'checkpoints' / 'last.ckpt'}", f"--output={tmp_path / 'ar'}"])
    average = last(whole_run)["state_dict"]
    exported = ARModel.from_pretrained(tmp_path / "ar").state_dict()
    assert {f"ar.{name}" for name in exported} == average.keys()
    assert all(torch.equal(tensor, average[f"ar.{name}"]) for name, tensor in exported.items())


def test_mixed_precision(command, whole_run, tmp_path):
    assert run(main, command(tmp_path, "fsdp", 6, "--trainer.precision=bf16-mixed"), world=2) == [0, 0]
    assert {tensor.dtype for tensor in last(tmp_path)["current_model_state"].values()} == {torch.float32}
    one, two = (last(folder)["current_model_state"]["ar.head.weight"] for folder in (whole_run, tmp_path))
    assert 0 < float((one - two).norm() / one.norm()) < 0.1


def test_recomputed_blocks(command, broken_run, tmp_path):
    more = "--model.init_args.activation_checkpointing=true"
    assert run(main, command(tmp_path, "fsdp", 4, more), world=2) == [0, 0]
    assert largest_difference(tmp_path, broken_run) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_compiled_blocks(command, broken_run, recompute, tmp_path):
    more = ["--model.init_args.compile=true", f"--model.init_args.activation_checkpointing={recompute}"]
    more += [f"--trainer.callbacks+={__name__}.Compiled"]
    assert run(main, command(tmp_path, "fsdp", 4, *more), world=2) == [0, 0]
    assert 0 < largest_difference(tmp_path, broken_run) < 1e-4


def main_into(file: Path, arguments: list[str]) -> None:
    with open(file, "w") as errors, redirect_stderr(errors):
        main(arguments)


def test_what_cannot_be_sharded(command, images, tmp_path):
    tokenizer = [*map(str, fit_tokenizer(*images, tmp_path, max_steps=1)), LAYER]
    for arguments, message in (
        (tokenizer, "shards AR models, this is a TokenizerModule: use ddp"),
        (command(tmp_path, "fsdp", 1, "--trainer.precision=bf16-true", devices=1), "use bf16-mixed or 32-true"),
    ):
        assert run(main_into, tmp_path / "errors", arguments) == [2]
        assert message in (tmp_path / "errors").read_text().splitlines()[-1]
