"""`dar sample` with a tokenizer and an AR model of their own: folders, and a checkpoint of `dar fit`."""

import json
import shlex

import numpy as np
import pytest
from tiny_models import CLASSES, fit_ar, write_tokens

from dar_lightning.cli import main
from dar_lightning.commands.sample import sample
from dar_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers


def drawn(folder, **options) -> tuple[np.ndarray, dict]:
    sample(str(folder), per_class=1, guidance=2.0, **options)
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], json.loads((folder / "samples.json").read_text())


def test_a_checkpoint_draws_as_the_folder_exported_of_it(pipeline, tmp_path):
    """Its average, where it has one."""
    tokens = write_tokens(tmp_path / "tokens", 8)
    command = fit_ar(tokens, tokens, tmp_path / "ar", max_steps=3, limit_val_batches=0)
    command += [
        f"--model.init_args.init_from={pipeline}/ar",
        "--model.init_args.optimizer.lr=0.05",
        "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
        "--trainer.callbacks.save_last=true",
        "--trainer.callbacks+=dar_lightning.training.callbacks.EMA",
        "--trainer.callbacks.decay=0.5",
    ]
    main([str(word) for word in command])
    checkpoint, tokenizer = str(tmp_path / "ar/checkpoints/last.ckpt"), f"{pipeline}/tokenizer"
    images, record = drawn(tmp_path / "drawn", tokenizer=tokenizer, ar=checkpoint)
    assert record["classes"] == [str(label) for label in range(len(CLASSES))], "checkpoints know no names"
    assert record["ema"]["ar"] is True
    for weights, same in (("auto", True), ("raw", False)):
        main(["export", "--ckpt", checkpoint, "--output", str(tmp_path / weights), "--weights", weights])
        exported, its = drawn(tmp_path / f"from_{weights}", tokenizer=tokenizer, ar=str(tmp_path / weights))
        assert np.array_equal(images, exported) == (record["weights"] == its["weights"]) == same
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/samples.json").read_text())
    assert again["pixels_sha256"] == record["pixels_sha256"]


def test_folders(pipeline, tmp_path):
    parts = {"tokenizer": f"{pipeline}/tokenizer", "ar": f"{pipeline}/ar"}
    images, _ = drawn(tmp_path / "parts", **parts)
    assert np.array_equal(images, drawn(tmp_path / "whole", pipeline=pipeline)[0])
    with pytest.raises(UserError, match=r"config\.json"):
        sample(str(tmp_path / "mixed"), tokenizer=f"{pipeline}/tokenizer/config.json", ar=f"{pipeline}/ar")
