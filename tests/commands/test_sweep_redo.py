"""dar sweep and results of other code or data: one line names them, --redo changed makes them anew."""

import json
import shutil
from pathlib import Path

import pytest
from small_sweep import cell, plan

from dar_lightning.records import provenance
from dar_lightning.sweeps import run

LINE = "other code or data made "


def stages(**more: dict) -> dict:
    """`train` is the same for both cells, `weights` needs it, `apart` does not."""
    return {
        "train": {"verb": "extract", "options": {"tokenizer": "t", "shards": "s"}},
        "weights": {"verb": "export", "options": {"ckpt": "{train}/x", "weights": "{K}"}},
        "apart": {"verb": "export", "options": {"weights": "apart-{K}"}},
    } | more


def study(**settings) -> dict:
    return plan(seeds=[0], grid={"K": [1, 2]}, **{"stages": stages()} | settings)


APART = study(stages={"apart": stages()["apart"]})
ALL = ["extract", "export", "export", "export", "export"]


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A module of the package that the sweep takes for its own."""
    module = tmp_path / "package" / "module.py"
    module.parent.mkdir()
    module.write_text("first = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", module.parent)
    return module


def folder(stage: str, number: int = 1) -> Path:
    """Of a cell's stage."""
    return Path("out", next(one["folder"] for one in cell(f"K={number}")["stages"] if one["name"] == stage))


def verbs(commands: list[list[str]]) -> list[str]:
    return [words[0] for words in commands]


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(LINE)]


def statuses() -> list[str]:
    return [cell(f"K={k}")["status"] for k in (1, 2)]


def fails(runs, settings: dict, *options: str, broken: str = "export") -> None:
    runs.broken.append(broken)
    with pytest.raises(SystemExit):
        runs(settings, *options)
    runs.broken.clear()


def test_other_code_is_named_in_one_line_and_nothing_is_done_again(runs, code, capsys):
    runs(APART, "--only", "[0]")
    code.write_text("second = 2\n")
    runs(APART, "--only", "[1]")
    assert lines(capsys) == []
    for text, named in (("second", "1 of 2 cells, {}: K=1 seed 0"), ("third", "2 of 2 cells, {}: all")):
        code.write_text(f"{text} = {2 if text == 'second' else 3}\n")  # what counts is what the code says
        assert runs(APART) == []
        assert lines(capsys) == [LINE + named.format("--redo changed makes them anew")]


def test_redo_makes_anew_what_other_code_made(runs, code, capsys):
    assert verbs(runs(study())) == ALL
    (folder("train") / "checkpoints").mkdir()
    before = json.loads((folder("train") / "done.json").read_text())
    code.write_text("second = 2\n")
    assert runs(study(), "--redo", "changed", "--dry-run") == []
    assert "  # done" not in capsys.readouterr().out
    assert verbs(runs(study(), "--redo", "changed")) == ALL
    assert lines(capsys) == [f"{LINE}2 of 2 cells, they are made anew: all"]
    (old,) = Path("out/replaced").glob("train-*")
    assert old.name == f"{folder('train').name}-1"
    assert json.loads((old / "done.json").read_text()) == before
    assert (old / "checkpoints").is_dir()
    assert not (folder("train") / "checkpoints").exists(), "a training would go on from there"
    assert cell("K=1")["stages"][0]["code"]["sha256"] != before["made"]["code"]["sha256"]
    assert runs(study(), "--redo", "changed") == []
    assert lines(capsys) == []

    for path in Path("out/shared").glob("*/done.json"):  # as the first versions wrote it
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "made"})
        )
    assert runs(study()) == []
    assert lines(capsys) == [f"{LINE}2 of 2 cells, --redo changed makes them anew: all"]
    assert cell("K=1")["stages"][0]["code"] is None
    assert len(runs(study(), "--redo", "changed")) == 5


@pytest.mark.parametrize("index", ["s/index.json", "c/index.json"])
def test_what_follows_other_data_is_made_anew(index, runs, code, capsys):
    """An option names the folder of shards, or a config file does."""
    Path("layer.yaml").write_text("data: {train: c}\n")
    train = {"verb": "extract", "config": ["layer.yaml"], "options": {"shards": "s"}}
    settings = study(stages=stages(train=train))
    for path in ("s", "c"):
        Path(path).mkdir()
        Path(path, "index.json").write_text("first")
    runs(settings)
    Path(index).write_text("second")
    capsys.readouterr()
    assert runs(settings) == []
    assert len(lines(capsys)) == 1
    runs(settings, "--redo", "changed", "--dry-run")
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dar ")]
    assert [line.endswith("  # done") for line in shown] == [False, False, True, False, True], "apart needs no shards"
    done = runs(settings, "--redo", "changed")
    assert verbs(done) == ["extract", "export", "export"]
    assert not any("apart" in word for words in done for word in words)


def test_an_interrupted_redo_goes_on_without_being_asked_again(runs, code, capsys):
    """Once the first stage is new, what needs it is, too; until then its cells have no metrics."""
    runs(study())
    code.write_text("second = 2\n")
    fails(runs, study(), "--redo", "changed", "--only", "[0]")
    assert statuses() == ["failed", "pending"]
    assert not Path("out/cells/K=2/seed0/metrics.json").exists()
    capsys.readouterr()
    done = runs(study())
    assert [word for words in done for word in words if word.startswith("--weights=")] == ["--weights=1", "--weights=2"]
    assert len(lines(capsys)) == 1, "`apart` is still of the first code"
    assert statuses() == ["done", "done"]
    assert verbs(runs(study(), "--redo", "changed")) == ["export", "export"]


def test_an_earlier_stage_that_is_gone_and_made_again_alike_changes_nothing(runs, code):
    runs(study())
    shutil.rmtree(folder("train"))
    runs(study(), "--slurm")
    assert cell("K=1")["status"] == "done", "its metrics are still those of its stages"
    assert verbs(runs(study())) == ["extract"]


def test_code_that_is_edited_meanwhile_makes_no_stage_twice(runs, code, monkeypatch):
    """`val`, which both cells share, is already of a third code when the second cell comes to it."""
    settings = study(stages=stages(val={"verb": "extract", "options": {"shards": "v"}}))
    runs(settings)
    code.write_text("second = 2\n")
    call = run._call

    def edit(*arguments):
        code.write_text("third = 3\n")
        return call(*arguments)

    monkeypatch.setattr(run, "_call", edit)
    assert sorted(verbs(runs(settings, "--redo", "changed"))) == [*4 * ["export"], *2 * ["extract"]]


def test_a_stage_that_other_code_began_is_of_others(runs, code, capsys):
    """A training that was interrupted has noted what code did its first steps."""
    fails(runs, APART, broken="apart-1")
    noted = folder("apart") / "tensorboard" / "provenance.json"
    noted.parent.mkdir()
    noted.write_text(json.dumps([{"from_step": 0, "code": {"sha256": "0" * 64}}]))
    assert len(runs(APART)) == 1, "it goes on"
    assert runs(APART) == []
    assert lines(capsys)[-1] == f"{LINE}1 of 2 cells, --redo changed makes them anew: K=1 seed 0"
    assert len(runs(APART, "--redo", "changed")) == 1
    assert not noted.exists()
    capsys.readouterr()
    assert runs(APART) == []
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
