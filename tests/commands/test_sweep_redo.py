"""dar sweep and results of other code or data: one line names them, --redo changed makes them anew."""

import json
import shutil
from pathlib import Path

import pytest
from small_sweep import cell, plan

from dar_lightning.records import provenance
from dar_lightning.sweeps import run

LINE = "other code or data made "
HOW, REDO = "--redo changed makes them anew", ("--redo", "changed")
# `train` is the same for both cells, `weights` needs it, `apart` does not.
STAGES = {
    "train": {"verb": "extract", "options": {"tokenizer": "t", "shards": "s"}},
    "weights": {"verb": "export", "options": {"ckpt": "{train}/x", "weights": "{K}"}},
    "apart": {"verb": "export", "options": {"weights": "apart-{K}"}},
}
ALL = ["extract", "export", "export", "export", "export"]


def study(*only: str, **more: dict) -> dict:
    """Two cells, of all stages or of some alone."""
    return plan(seeds=[0], grid={"K": [1, 2]}, stages={name: STAGES[name] for name in only or STAGES} | more)


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A module of the package that the sweep takes for its own."""
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text("first = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", module.parent)
    return module


@pytest.fixture
def verbs(runs, code):
    """Runs a sweep; the verbs of its commands."""
    return lambda settings, *options: [words[0] for words in runs(settings, *options)]


def folder(stage: str) -> Path:
    """Of the first cell."""
    return Path("out", next(one["folder"] for one in cell("K=1")["stages"] if one["name"] == stage))


def lines(capsys) -> list[str]:
    return [line.removeprefix(LINE) for line in capsys.readouterr().out.splitlines() if line.startswith(LINE)]


def fails(runs, settings: dict, *options: str, broken: str = "export") -> None:
    runs.broken.append(broken)
    with pytest.raises(SystemExit):
        runs(settings, *options)
    runs.broken.clear()


def test_other_code_is_named_in_one_line_and_nothing_is_done_again(verbs, code, capsys):
    settings = study("apart")
    verbs(settings, "--only", "[0]")
    code.write_text("second = 2\n")
    verbs(settings, "--only", "[1]")
    assert lines(capsys) == []
    for text, count, names in (("second", 1, "K=1 seed 0"), ("third", 2, "all")):
        code.write_text(f"{text} = 2\n")  # what counts is what the code says
        assert verbs(settings) == []
        assert lines(capsys) == [f"{count} of 2 cells, {HOW}: {names}"]


def test_redo_makes_anew_what_other_code_made(verbs, code, capsys):
    assert verbs(study()) == ALL
    (folder("train") / "checkpoints").mkdir()
    before = json.loads((folder("train") / "done.json").read_text())
    code.write_text("second = 2\n")
    assert verbs(study(), *REDO) == ALL
    assert lines(capsys) == ["2 of 2 cells, they are made anew: all"]
    (old,) = Path("out/replaced").glob("train-*")
    assert old.name == f"{folder('train').name}-1"
    assert json.loads((old / "done.json").read_text()) == before
    assert (old / "checkpoints").is_dir()
    assert not (folder("train") / "checkpoints").exists(), "a training would go on from there"
    assert cell("K=1")["stages"][0]["code"]["sha256"] != before["made"]["code"]["sha256"]
    assert verbs(study(), *REDO) == []
    assert lines(capsys) == []


@pytest.mark.parametrize("index", ["s/index.json", "c/index.json"])
def test_what_follows_other_data_is_made_anew(index, runs, code, capsys):
    """An option names the folder of shards, or a config file does."""
    Path("layer.yaml").write_text("data: {train: c}\n")
    settings = study(train={"verb": "extract", "config": ["layer.yaml"], "options": {"shards": "s"}})
    for path in ("s", "c"):
        Path(path).mkdir()
        Path(path, "index.json").write_text("first")
    runs(settings)
    Path(index).write_text("second")
    capsys.readouterr()
    assert runs(settings) == []
    assert len(lines(capsys)) == 1
    runs(settings, *REDO, "--dry-run")
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dar ")]
    assert [line.endswith("  # done") for line in shown] == [False, False, True, False, True], "apart needs no shards"
    done = runs(settings, *REDO)
    assert [words[0] for words in done] == ["extract", "export", "export"]
    assert not any("apart" in word for words in done for word in words)


def test_an_interrupted_redo_goes_on_without_being_asked_again(runs, verbs, code, capsys):
    """Once the first stage is new, what needs it is, too; until then its cells have no metrics."""
    runs(study())
    code.write_text("second = 2\n")
    fails(runs, study(), *REDO, "--only", "[0]")
    assert [cell(f"K={k}")["status"] for k in (1, 2)] == ["failed", "pending"]
    assert not Path("out/cells/K=2/seed0/metrics.json").exists()
    capsys.readouterr()
    done = runs(study())
    assert [word for words in done for word in words if word.startswith("--weights=")] == ["--weights=1", "--weights=2"]
    assert len(lines(capsys)) == 1, "`apart` is still of the first code"
    assert [cell(f"K={k}")["status"] for k in (1, 2)] == ["done", "done"]
    assert verbs(study(), *REDO) == ["export", "export"]


def test_an_earlier_stage_that_is_gone_and_made_again_alike_changes_nothing(verbs):
    verbs(study())
    shutil.rmtree(folder("train"))
    verbs(study(), "--slurm")
    assert cell("K=1")["status"] == "done", "its metrics are still those of its stages"
    assert verbs(study()) == ["extract"]


def test_code_that_is_edited_meanwhile_makes_no_stage_twice(verbs, code, monkeypatch):
    """`val`, which both cells share, is already of a third code when the second cell comes to it."""
    settings = study(val={"verb": "extract", "options": {"shards": "v"}})
    verbs(settings)
    code.write_text("second = 2\n")
    call = run._call
    monkeypatch.setattr(run, "_call", lambda *given: (code.write_text("third = 3\n"), call(*given))[1])
    assert sorted(verbs(settings, *REDO)) == [*4 * ["export"], *2 * ["extract"]]


def test_a_stage_that_other_code_began_is_of_others(runs, verbs, capsys):
    """A training that was interrupted has noted what code did its first steps."""
    settings = study("apart")
    fails(runs, settings, broken="apart-1")
    noted = folder("apart") / "tensorboard" / "provenance.json"
    noted.parent.mkdir()
    noted.write_text(json.dumps([{"from_step": 0, "code": {"sha256": "0" * 64}}]))
    assert len(verbs(settings)) == 1, "it goes on"
    assert verbs(settings) == []
    assert lines(capsys)[-1] == f"1 of 2 cells, {HOW}: K=1 seed 0"
    assert len(verbs(settings, *REDO)) == 1
    assert not noted.exists()
    capsys.readouterr()
    assert verbs(settings) == []
    assert lines(capsys) == []


def test_a_stage_that_was_begun_from_what_was_made_anew_begins_anew(runs, code):
    """An interrupted training would go on, from its checkpoint, with other tokens."""
    fails(runs, study())
    half = folder("weights") / "half"
    half.write_text("")
    runs(study(), "--only", "[1]")
    assert half.exists(), "what it needs is as it was"
    code.write_text("second = 2\n")
    shutil.rmtree(folder("train"))
    runs(study())
    assert not half.exists()
