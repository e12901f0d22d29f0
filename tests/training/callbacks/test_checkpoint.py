"""`last.ckpt` is the last step, whatever ends the run, and older checkpoints are still resumed."""

import pytest
import torch
from tiny_models import fit_ar

from dar_lightning.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
EMA = [
    *("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.9"),
    "--trainer.callbacks.use_buffers=false",
]


def run(tokens, folder, checkpoint: str, *options: str, **trainer) -> None:
    words = [
        *fit_ar(*tokens, folder, limit_val_batches=0, **trainer),
        *(f"--trainer.callbacks+={checkpoint}", "--trainer.callbacks.every_n_train_steps=2"),
        *("--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=0"),
    ]
    main([str(word) for word in [*words, *EMA, "--ckpt_path=last", *options]])


def saved(folder) -> dict:
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    return torch.load(folder / "checkpoints" / "last.ckpt")


OURS = "dar_lightning.training.callbacks.LastStepCheckpoint"


@pytest.mark.parametrize(("end", "step"), [({"max_steps": 3}, 3), ({"max_steps": 4}, 4), ({"max_epochs": 1}, 5)])
def test_the_last_step_is_saved(tokens, tmp_path, end, step):
    run(tokens, tmp_path, OURS, **end)
    checkpoint = saved(tmp_path)
    assert checkpoint["global_step"] == step
    raw, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    assert any(not torch.equal(raw[name], average[name]) for name in average), "the optimizer's weights are kept"


@pytest.mark.parametrize("first", ["ModelCheckpoint", OURS])
def test_a_longer_run_goes_on_from_it(tokens, tmp_path, first):
    run(tokens, tmp_path / "parts", first, max_steps=3)
    run(tokens, tmp_path / "parts", OURS, max_steps=7)
    run(tokens, tmp_path / "whole", OURS, max_steps=7)
    parts, whole = saved(tmp_path / "parts"), saved(tmp_path / "whole")
    assert parts["global_step"] == whole["global_step"] == 7
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(tensor, whole[key][name]) for name, tensor in parts[key].items())
