"""Three ranks: a run whose data break on one of them saves its step, and goes on with the bits of an unbroken one."""

import os
from pathlib import Path

import pytest
import torch
from killable import run
from tiny_models import fit_ar

from dar_lightning.cli import main
from dar_lightning.data.loader import Loader
from dar_lightning.errors import MachineFault

STEPS, BREAK = 5, 3


def breaks(words: list[str], rank: int) -> None:
    """A run that a rank gets no batch for, after some."""
    whole = Loader.__iter__

    def broken(self):
        for number, batch in enumerate(whole(self)):
            if number == BREAK:
                raise MachineFault("the server is gone")
            yield batch

    if os.environ["LOCAL_RANK"] == str(rank):
        Loader.__iter__ = broken
    main(words)


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_a_run_that_breaks_on_one_rank_goes_on_bit_for_bit(tokens, tmp_path):
    """Sums of three numbers depend on their order, and DDP's on the place in its buckets."""

    def words(folder: Path) -> list[str]:
        return [
            *map(str, fit_ar(*tokens, folder, devices=3, max_steps=STEPS, limit_val_batches=0)),
            *("--data.init_args.batch_size=1", "--model.init_args.optimizer.lr=0.01", "--ckpt_path=last"),
            "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
            *("--trainer.callbacks.every_n_train_steps=100", "--trainer.callbacks.save_top_k=0"),
        ]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(main, words(whole), world=3) == [0, 0, 0]
    assert run(breaks, words(broken), 1, world=3)[1] == 1
    assert last(broken)["global_step"] == BREAK
    assert run(main, words(broken), world=3) == [0, 0, 0]
    expected, found = last(whole), last(broken)
    assert expected["global_step"] == found["global_step"] == STEPS
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in expected["state_dict"].items())
