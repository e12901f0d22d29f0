"""What `dar sweep` writes is what `dar report` reads: two small trainings, from their commands to a table."""

import pytest
from tiny_models import fit_ar, write_tokens

from dar_lightning.cli import main
from dar_lightning.commands.sweep import sweep
from dar_lightning.sweeps.plan import Stage
from dar_lightning.sweeps.results import read_sweep


@pytest.mark.slow
def test_from_trainings_to_a_table(tmp_path, capsys):
    train, val = (write_tokens(tmp_path / name, 8) for name in ("train", "val"))
    words = fit_ar(train, val, "", max_steps=2, val_check_interval=1, limit_val_batches=1)[1:]
    options = dict(word.removeprefix("--").split("=", 1) for word in words)
    options |= {"seed_everything": "{seed}", "model.init_args.optimizer.lr": "{lr}"}
    del options["trainer.default_root_dir"]
    folder = tmp_path / "sweep"
    sweep("rates", {"ar": Stage("fit", [], options)}, {"lr": [0.001, 0.1]}, figures=["val/loss"], output=str(folder))
    capsys.readouterr()
    main(["report", str(folder)])
    text = capsys.readouterr().out
    found = read_sweep(folder)
    for cell in found.cells:
        [run] = cell.having("done")
        [stage] = cell.stages("ar")
        assert run.figures["val/loss"] == stage.scalars["val/loss"].values[-1], "the last validation's"
        assert f"| {cell.values['lr']} | 1 | {run.figures['val/loss']:.4g} |" in text
    first, second = (cell.runs[0].figures["val/loss"] for cell in found.cells)
    assert first != second
    assert {"figures.png", "curves.png"} <= {path.name for path in (folder / "report").iterdir()}
