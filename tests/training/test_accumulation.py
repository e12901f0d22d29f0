"""A global batch in parts: the same samples as in one piece, and what a run says of its plan."""

import pytest
import torch
from refusals import refusal, refused
from tiny_models import fit_ar
from tiny_training import events
from torch.utils.data import TensorDataset

from dar_lightning.cli import main
from dar_lightning.data.sampler import TrainSampler, shuffled
from dar_lightning.training.batch_plan import accumulation


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "devices", "expected"),
    [
        (1024, 128, 8, 1),
        (1024, 64, 1, 16),
        (6, 3, 2, 1),
        (1024, 128, 16, r"global_batch is 1024: not a multiple of batch_size 128 x 16 .* = 2048; use .*batch_size 64$"),
        (1024, 48, 8, r"= 384; use data\.init_args\.batch_size 32 or 64$"),
        (1024, 64, 6, r"6 devices cannot share it evenly; use 1020 or 1026$"),
        (4, 1, 8, r"8 devices cannot share it evenly; use 8$"),
    ],
)
def test_the_number_of_parts(global_batch, batch_size, devices, expected):
    """What does not fit is answered with what would."""
    if isinstance(expected, int):
        assert accumulation(global_batch, batch_size, devices) == expected
    else:
        refused(expected, accumulation, global_batch, batch_size, devices)


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


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--global_batch=6"], "global_batch is 6: not a multiple of batch_size 4 x 1 device(s) = 4; use"),
        (["--global_batch=0"], "global_batch is 0: it must be at least 1"),
        (["--global_batch=8", "--trainer.accumulate_grad_batches=3"], "8 makes it 2; leave one of them out"),
    ],
)
def test_mistakes_end_before_the_first_file(options, line, tokens, tmp_path, capsys):
    assert line in refusal(capsys, [*fit_ar(*tokens, tmp_path), *options])
    assert not list(tmp_path.iterdir())


def test_the_plan_is_printed_and_logged(tokens, tmp_path, caplog):
    options = ["--data.init_args.batch_size=2", "--global_batch=8", "--trainer.max_epochs=3", "--trainer.max_steps=-1"]
    descent = ["--model.init_args.optimizer.decay_epochs=1.5", "--model.init_args.optimizer.lr=1e-3"]
    with caplog.at_level("INFO"):
        main([str(word) for word in [*fit_ar(*tokens, tmp_path), *options, *descent]])
    plan = "global batch 8 = 2 x 1 device x 4 accumulated; 6 steps (3 epochs of 2); lr 0.001"
    assert plan in caplog.text
    assert events(tmp_path).Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode() == plan
