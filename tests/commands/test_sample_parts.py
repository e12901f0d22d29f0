"""`dar sample` with a tokenizer and an AR model of two trainings: checkpoints draw as the folders exported of them."""

import json
import shlex

import numpy as np
import pytest
from tiny_models import CLASSES, fit_ar, fit_tokenizer, make_ar, make_tokenizer, write_images, write_tokens

from dar_lightning.cli import main
from dar_lightning.commands.sample import sample

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
PARTS = ("tokenizer", "ar")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """A checkpoint of each part after three steps: raw weights and their average, which draw different images."""
    root = tmp_path_factory.mktemp("runs")
    make_tokenizer().save_pretrained(root / "start/tokenizer")
    make_ar().save_pretrained(root / "start/ar")
    images, tokens = write_images(root / "images", 8), write_tokens(root / "tokens", 8)
    options = {"max_steps": 3, "limit_val_batches": 0}
    commands = {
        "tokenizer": fit_tokenizer(images, images, root / "tokenizer", **options),
        "ar": fit_ar(tokens, tokens, root / "ar", **options),
    }
    for part, command in commands.items():
        command += [
            f"--model.init_args.init_from={root}/start/{part}",
            "--model.init_args.optimizer.lr=0.05",
            "--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint",
            "--trainer.callbacks.save_last=true",
            "--trainer.callbacks+=dar_lightning.training.callbacks.EMA",
            "--trainer.callbacks.decay=0.5",
        ]
        main([str(word) for word in command])
    return {part: str(root / part / "checkpoints/last.ckpt") for part in PARTS}


def pixels(folder) -> np.ndarray:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"]


def test_checkpoints_draw_as_the_folders_exported_of_them(checkpoints, tmp_path):
    for weights in ("auto", "raw"):
        for part, path in checkpoints.items():
            main(["export", "--ckpt", path, "--output", str(tmp_path / weights / part), "--weights", weights])
    given = [word for part, path in checkpoints.items() for word in (f"--{part}", path)]
    main(["sample", *given, "--per_class", "2", "--guidance", "2", "--output", str(tmp_path / "drawn")])
    for weights, same in (("auto", True), ("raw", False)):
        folders = {part: str(tmp_path / weights / part) for part in PARTS}
        sample(str(tmp_path / f"from_{weights}"), **folders, per_class=2, guidance=2.0)
        assert np.array_equal(pixels(tmp_path / "drawn"), pixels(tmp_path / f"from_{weights}")) == same
    drawn, exported = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("drawn", "from_auto"))
    assert drawn["weights"] == exported["weights"]
    assert drawn["ema"] == exported["ema"] == dict.fromkeys(PARTS, True)
    assert drawn["classes"] == [str(label) for label in range(len(CLASSES))], "checkpoints know no names"
    main([*shlex.split(drawn["command"])[1:-1], str(tmp_path / "again")])
    assert np.array_equal(pixels(tmp_path / "again"), pixels(tmp_path / "drawn"))
