"""Sharded training on two ranks: DDP's numbers, from slices, with checkpoints that one device reads."""

import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from tiny_models import AR, fit_ar, fit_tokenizer, options
from tiny_training import STILL, events

from dar_lightning.cli import main
from dar_lightning.training.fsdp import own_slice
from dar_lightning.weights.lightning import load_lightning_checkpoint

pytestmark = pytest.mark.slow
LAYER = f"--config={Path(__file__).parents[2] / 'experiments' / 'trainer' / 'fsdp.yaml'}"
OURS = "--trainer.callbacks+=dar_lightning.training.callbacks."


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
    """NaN in the last rank's slice of one gradient of the second step, which must change no slice of that weight."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = own_slice(pl_module.ar.head.weight).clone()

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1 and trainer.global_rank == 1:
            own_slice(pl_module.ar.head.weight.grad)[0, 0] = torch.nan

    def on_train_batch_end(self, trainer, pl_module, *args):
        same = torch.equal(self.before, own_slice(pl_module.ar.head.weight))
        assert same == (trainer.global_step == 2)


class Compiled(Callback):
    """Fails unless something was."""

    def on_train_start(self, trainer, pl_module):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    def on_train_end(self, trainer, pl_module):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.fixture(scope="module")
def command(tokens):
    """Folder, strategy, steps, further words and devices -> arguments of `dar`."""

    def arguments(folder: Path, strategy: str, steps: int, *more: str, devices: int = 2) -> list[str]:
        trainer = dict(devices=devices, max_steps=steps, val_check_interval=2, gradient_clip_val=0.05)
        words = [
            *fit_ar(*tokens, folder, **trainer, strategy="ddp" if devices > 1 else "auto"),
            f"--model.init_args.config={json.dumps(AR | STILL)}",
            *(f"--data.init_args.batch_size={4 // devices}", "--ckpt_path=last", "--model.init_args.optimizer.lr=0.01"),
            *(f"{OURS}LastStepCheckpoint", "--trainer.callbacks.every_n_train_steps=2"),
            "--trainer.callbacks.save_top_k=-1",
            *(f"{OURS}EMA", "--trainer.callbacks.decay=0.7", f"{OURS}SkipBadSteps"),
            f"--trainer.callbacks+={__name__}.BadGradient",
            *([LAYER, f"--trainer.callbacks+={__name__}.HoldsHalf"] if strategy == "fsdp" else []),
        ]
        return [str(word) for word in (*words, *more)]

    return arguments


@pytest.fixture(scope="module")
def drawing(images, tokenizer_folder) -> list[str]:
    """Callbacks that need the whole model; of GenerationFID's three batches rank 0 draws two."""
    fid = dict(reference=images[1], features="color_edges", num_samples=5, batch_size=2, every_n_steps=4)
    tokenizer = f"--trainer.callbacks.tokenizer={tokenizer_folder}"
    return [f"{OURS}Samples", tokenizer, f"{OURS}GenerationFID", tokenizer, *options("trainer.callbacks", fid)]


@pytest.fixture(scope="module")
def whole_run(command, drawing, two_ranks, tmp_path_factory) -> Path:
    """Six sharded steps, of which the second is skipped."""
    folder = tmp_path_factory.mktemp("whole")
    two_ranks(main, command(folder, "fsdp", 6, *drawing))
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def fourth(whole_run) -> Path:
    """Its checkpoint after four steps."""
    (file,) = whole_run.rglob("*-step=4.ckpt")
    return file


def largest_difference(file: Path, other: Path) -> float:
    """Of two checkpoints' tensors, relative to each tensor's size; they must hold the same things."""
    one, two = torch.load(file), torch.load(other)
    assert one.keys() == two.keys()
    assert one["global_step"] == two["global_step"]
    groups = [state["optimizer_states"][0]["param_groups"] for state in (one, two)]
    assert [group["params"] for group in groups[0]] == [group["params"] for group in groups[1]]
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
    return np.asarray(Image.open(io.BytesIO(events(folder).Images("samples")[-1].encoded_image_string)), dtype=float)


def measured(folder: Path) -> float:
    """What GenerationFID has written."""
    (file,) = (folder / "evaluation").iterdir()
    return json.loads(file.read_text())["metrics"]["gFD-color_edges"]


def test_the_numbers_are_those_of_ddp(command, drawing, two_ranks, whole_run, tmp_path):
    two_ranks(main, command(tmp_path, "ddp", 6, *drawing))
    assert largest_difference(last(tmp_path), last(whole_run)) < 1e-4
    assert np.abs(drawn(tmp_path) - drawn(whole_run)).max() <= 1
    assert measured(tmp_path) == pytest.approx(measured(whole_run), rel=0.01)
    callbacks = torch.load(last(whole_run))["callbacks"]
    (counts,) = [state["counts"] for name, state in callbacks.items() if "SkipBadSteps" in name]
    assert counts.tolist() == [1, 0]


def test_resuming_changes_no_bit(command, drawing, two_ranks, whole_run, fourth, tmp_path):
    two_ranks(main, command(tmp_path / "two", "fsdp", 6, *drawing, f"--ckpt_path={fourth}"))
    assert largest_difference(last(tmp_path / "two"), last(whole_run)) == 0
    main(command(tmp_path / "one", "auto", 6, f"--ckpt_path={fourth}", devices=1))
    assert largest_difference(last(tmp_path / "one"), last(whole_run)) < 1e-4


def test_a_checkpoint_exports_its_average(whole_run):
    average = torch.load(last(whole_run))["state_dict"]
    exported = load_lightning_checkpoint(last(whole_run)).state_dict()
    assert {f"ar.{name}" for name in exported} == average.keys()
    assert all(torch.equal(tensor, average[f"ar.{name}"]) for name, tensor in exported.items())


def test_mixed_precision(command, two_ranks, fourth, tmp_path):
    two_ranks(main, command(tmp_path, "fsdp", 4, "--trainer.precision=bf16-mixed"))
    one, two = (torch.load(file)["current_model_state"] for file in (fourth, last(tmp_path)))
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    assert 0 < float((one["ar.head.weight"] - two["ar.head.weight"]).norm() / one["ar.head.weight"].norm()) < 0.1


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_compiled_blocks_that_are_recomputed(command, two_ranks, fourth, tmp_path):
    switches = options("model.init_args", dict(activation_checkpointing="true", compile="true"))
    two_ranks(main, command(tmp_path, "fsdp", 4, *switches, f"--trainer.callbacks+={__name__}.Compiled"))
    assert 0 < largest_difference(last(tmp_path), fourth) < 1e-4


def refusal(arguments: list[str]) -> str:
    """The line that `dar` ends with."""
    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match="2"):
        main(arguments)
    return errors.getvalue().splitlines()[-1]


def test_what_cannot_be_sharded(command, images, two_ranks, tmp_path):
    tokenizer = [*map(str, fit_tokenizer(*images, tmp_path, max_steps=1, devices=2)), LAYER]
    assert "shards AR models, this is a TokenizerModule: use ddp" in two_ranks(refusal, tokenizer)[0]
    half = command(tmp_path, "fsdp", 1, "--trainer.precision=bf16-true")
    assert "use bf16-mixed or 32-true" in two_ranks(refusal, half)[0]
