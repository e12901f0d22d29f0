"""A global batch in parts: the same samples and gradients as in one piece, and runs that resume between two parts."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from test_resume import WHAT, DieAt, Killed, ar_command, differences, last, run, tokenizer_command
from tiny_models import fit_ar
from tiny_training import STILL, ar_module, events, image_data, token_data, tokenizer_module, trainer
from torch.utils.data import TensorDataset

from dar_lightning.cli import main
from dar_lightning.data.sampler import TrainSampler, shuffled
from dar_lightning.errors import UserError
from dar_lightning.training.batch_plan import accumulation
from dar_lightning.training.callbacks import GlobalBatch


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "devices", "parts"),
    [(1024, 128, 8, 1), (1024, 64, 8, 2), (1024, 64, 1, 16), (1024, 64, 16, 1), (6, 3, 2, 1)],
)
def test_the_number_of_parts(global_batch, batch_size, devices, parts):
    assert accumulation(global_batch, batch_size, devices) == parts


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "devices", "message"),
    [
        (1024, 128, 16, r"global_batch is 1024: not a multiple of batch_size 128 x 16 .* = 2048; use .*batch_size 64$"),
        (1024, 48, 8, r"= 384; use data\.init_args\.batch_size 32 or 64$"),
        (1024, 64, 6, r"6 devices cannot share it evenly; use 1020 or 1026$"),
        (4, 1, 8, r"8 devices cannot share it evenly; use 8$"),
    ],
)
def test_what_does_not_fit_is_answered_with_what_would(global_batch, batch_size, devices, message):
    with pytest.raises(UserError, match=message):
        accumulation(global_batch, batch_size, devices)


@pytest.mark.parametrize("division", [(1, 24, 1), (2, 3, 4), (4, 1, 6)], ids=str)
def test_steps_hold_the_same_samples_however_they_are_divided(division):
    """103 samples in steps of 24: four steps an epoch, and 7 samples are left out."""
    devices, batch_size, parts = division
    steps = [set() for _ in range(8)]
    for rank in range(devices):
        sampler = TrainSampler(
            TensorDataset(torch.zeros(103)), lambda e: shuffled([50, 53], 0, e, 2), batch_size, devices, rank, parts
        )
        assert sampler.batches == 4 * parts
        for epoch in range(2):
            sampler.position = epoch * sampler.batches
            for i, ticket in enumerate(sampler):
                steps[4 * epoch + i // (batch_size * parts)].add((ticket.epoch, ticket.index))
    expected = [(epoch, shuffled([50, 53], 0, epoch, 2)[24 * i : 24 * (i + 1)]) for epoch in range(2) for i in range(4)]
    assert steps == [{(epoch, int(index)) for index in indices} for epoch, indices in expected]


class Gradients(Callback):
    """What the first optimizer step is given."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            self.found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}


def first_gradients(module, data, global_batch: int) -> dict:
    gradients = Gradients()
    trainer(GlobalBatch(global_batch), gradients, max_steps=1, limit_val_batches=0).fit(module, data)
    return gradients.found


def check_gradients(found: dict, model: torch.nn.Module, prefix: str) -> None:
    by_hand = {prefix + n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == by_hand.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-5, atol=1e-6)


def test_two_batches_of_tokens_are_one_of_twice_the_size(tokens):
    module = ar_module(STILL)
    whole = copy.deepcopy(module.ar)
    found = first_gradients(module, token_data(tokens, 3), global_batch=6)
    batch = next(iter(token_data(tokens, 6).train_dataloader()))
    F.cross_entropy(whole(batch["label"], batch["codes"]).transpose(1, 2), batch["codes"]).backward()
    check_gradients(found, whole, "ar.")


def test_two_batches_of_images_are_one_of_twice_the_size(images):
    """At times at which every batch reads as many tokens, over which the codebook's losses are averaged."""
    module = tokenizer_module()
    whole = copy.deepcopy(module.tokenizer).train()
    drawn, original = [], module.tokenizer.training_losses

    def record(pixels, u):
        u = module.tokenizer.schedule.stratified_times(len(u), torch.Generator().manual_seed(len(drawn)))
        drawn.append((u, torch.randn_like(pixels)))
        return original(pixels, *drawn[-1])

    module.tokenizer.training_losses = record
    found = first_gradients(module, image_data(images), global_batch=8)
    u, noise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    assert not torch.equal(noise[:4], noise[4:])
    batch = next(iter(image_data(images, 8).train_dataloader()))
    losses = whole.training_losses(batch["image"] / 127.5 - 1, u, noise)
    (losses["flow"] + losses["vq"] + losses["commit"]).backward()
    check_gradients(found, whole, "tokenizer.")


# ---- resuming


class SaveAndDie(Callback):
    """A checkpoint after a number of batches, wherever that is, and the end of the process."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(trainer.checkpoint_callback.dirpath + "/last.ckpt")
            raise Killed


class SaveInTheStep(DieAt):
    """A checkpoint before an optimizer step, as Lightning's save_on_exception writes it, and the end of the process."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(trainer.checkpoint_callback.dirpath + "/last.ckpt")
            raise Killed


PARTS = ["--data.init_args.batch_size=2", "--global_batch=4"]  # 22 samples: 5 steps of two batches in each epoch


@pytest.fixture(scope="module")
def whole(images, tokens, tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("whole")
    run([*tokenizer_command(images, root / "tokenizer"), *PARTS], every=14)
    run([*ar_command(tokens, root / "ar"), *PARTS], every=14)
    return {part: last(root / part) for part in ("tokenizer", "ar")}


# Batches 2k + 1 are the first half of step k: 7 is one before the codebook starts, 15 one of the second epoch.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "callback", "value"),
    [("ar", "SaveAndDie", 15), ("ar", "SaveInTheStep", 4), ("tokenizer", "SaveAndDie", 7)],
)
def test_a_run_resumes_between_two_parts(part, callback, value, images, tokens, whole, tmp_path):
    command = tokenizer_command(images, tmp_path) if part == "tokenizer" else ar_command(tokens, tmp_path)
    argument = "batches" if callback == "SaveAndDie" else "step"
    deadly = [f"--trainer.callbacks+={__name__}.{callback}", f"--trainer.callbacks.{argument}={value}"]
    with pytest.raises(Killed):
        run([*command, *PARTS, *deadly], every=14)
    assert last(tmp_path)["global_step"] == (value // 2 if callback == "SaveAndDie" else value)
    run([*command, *PARTS], every=14)
    for key in WHAT:
        assert differences(whole[part][key], last(tmp_path)[key], key) == []


def test_other_parts_are_refused(tokens, tmp_path, capsys):
    fit = [str(word) for word in ar_command(tokens, tmp_path)]
    run([*fit, *PARTS, "--trainer.max_steps=2"], every=2)
    shutil.rmtree(tmp_path / "logs")
    with pytest.raises(SystemExit) as stop:
        run([*fit, *PARTS[:1], "--global_batch=8"], every=2)
    assert stop.value.code == 2
    assert "number of batches per optimizer step was 2 in the checkpoint and is 4 now" in capsys.readouterr().err


# ---- what the run says


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--global_batch=6"], "global_batch is 6: not a multiple of batch_size 4 x 1 device(s) = 4; use"),
        (["--global_batch=0"], "global_batch is 0: it must be at least 1"),
        (
            ["--global_batch=8", "--trainer.accumulate_grad_batches=3"],
            "global_batch 8 makes it 2; leave one of them out",
        ),
    ],
)
def test_mistakes_end_before_the_first_file(options, line, tokens, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in [*fit_ar(*tokens, tmp_path), *options]])
    assert stop.value.code == 2
    assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_plan_is_printed_and_logged(tokens, tmp_path, caplog):
    options = ["--data.init_args.batch_size=2", "--global_batch=8", "--trainer.max_epochs=3", "--trainer.max_steps=-1"]
    descent = ["--model.init_args.optimizer.decay_epochs=1.5", "--model.init_args.optimizer.lr=1e-3"]
    with caplog.at_level("INFO"):
        main([str(word) for word in [*fit_ar(*tokens, tmp_path), *options, *descent]])
    plan = "global batch 8 = 2 x 1 device x 4 accumulated; 6 steps (3 epochs of 2); lr 0.001"
    assert plan in caplog.text
    assert events(tmp_path).Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode() == plan
