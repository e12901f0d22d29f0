"""`dar quickstart`: its command lines parse, its stages keep time, fail in one line and are not done twice."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_quickstart import small_configs, small_photos

from dar_lightning.cli import main
from dar_lightning.commands import quickstart as module
from dar_lightning.commands.quickstart import Stage, quickstart, road, run_stage
from dar_lightning.errors import UserError
from dar_lightning.generation.pipeline import DARPipeline

ROOT = Path(__file__).parents[2]
ROADS = {"on": road(Path("OUT"), from_scratch=False), "scratch": road(Path("OUT"), from_scratch=True)}
COMMANDS = [(f"{name}-{stage.name}", command) for name in ROADS for stage in ROADS[name] for command in stage.commands]


@pytest.mark.parametrize(("stage", "command"), COMMANDS, ids=[f"{stage}-{command[0]}" for stage, command in COMMANDS])
@pytest.mark.filterwarnings("ignore")
def test_every_command_parses(stage, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    given = [word[2:] for word in command if word.startswith("--") and word != "--config"]
    for name in given:
        value = config
        for part in name.split("."):
            value = value[part]
        assert str(value) == command[command.index(f"--{name}") + 1]


@pytest.mark.parametrize("stages", ROADS.values(), ids=ROADS)
def test_each_stage_reads_what_an_earlier_one_wrote(stages):
    """Every path under the output folder is first the result, the output or the root of a command, then an input."""
    outputs = ("--output", "--trainer.default_root_dir")
    written = []
    for command in (command for stage in stages for command in stage.commands):
        pairs = list(itertools.pairwise(command))
        for option, value in pairs:
            if value.startswith("OUT") and option not in outputs:
                assert any(value.startswith(place) for place in written), f"{option} {value} is nobody's output"
        written += [value for option, value in pairs if option in outputs]
    for stage in stages:
        assert any(str(stage.result).startswith(place) for place in written)


def stage(folder: Path, command: tuple[str, ...] = ("--version",)) -> Stage:
    return Stage("try", "nothing much", 0.1, folder / "result.json", (command,))


def test_a_stage_counts_its_seconds_over_attempts(tmp_path, capfd):
    run_stage(stage(tmp_path), tmp_path)
    first = json.loads((tmp_path / "seconds.json").read_text())
    assert first["try"] > 0
    assert "$ dar --version" in capfd.readouterr().out
    run_stage(stage(tmp_path), tmp_path)
    assert json.loads((tmp_path / "seconds.json").read_text())["try"] > first["try"]


def test_a_stage_that_fails(tmp_path, capfd):
    failing = stage(tmp_path, ("sample", "--pipeline", str(tmp_path), "--output", str(tmp_path)))
    with pytest.raises(UserError, match="stage try stopped with status 2: the same command goes on from here"):
        run_stage(failing, tmp_path)
    assert "dar sample: " in capfd.readouterr().err
    assert list(json.loads((tmp_path / "seconds.json").read_text())) == ["try"]


@pytest.fixture
def fake_road(monkeypatch):
    """Three stages that only write their results; what ran is noted."""
    ran = []

    def run(stage: Stage, out: Path) -> None:
        ran.append(stage.name)
        stage.result.write_text("{}")

    def stages(out: Path, from_scratch: bool) -> list[Stage]:
        return [Stage(name, "writes", 0, out / f"{name}.json", ()) for name in ("one", "two", "three")]

    monkeypatch.setattr(module, "road", stages)
    monkeypatch.setattr(module, "run_stage", run)
    monkeypatch.setattr(module, "collect", lambda out: {})
    monkeypatch.setattr(module, "summary", lambda out, metrics: "summary")
    return ran


def test_finished_stages_are_skipped_unless_an_earlier_one_ran(tmp_path, fake_road, capsys):
    out = tmp_path / "out"
    quickstart(str(out))
    assert fake_road == ["one", "two", "three"]
    capsys.readouterr()
    quickstart(str(out))
    assert fake_road == ["one", "two", "three"]
    assert capsys.readouterr().out.count("done already") == 3
    (out / "two.json").unlink()
    quickstart(str(out))
    assert fake_road[3:] == ["two", "three"]


def test_fresh_starts_over_and_deletes_only_its_own(tmp_path, fake_road):
    out = tmp_path / "out"
    quickstart(str(out))
    (out / "old").touch()
    quickstart(str(out), fresh=True)
    assert fake_road[3:] == ["one", "two", "three"]
    assert not (out / "old").exists()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "dear.jpg").touch()
    with pytest.raises(UserError, match="holds other files: give a new folder"):
        quickstart(str(foreign), fresh=True)
    assert (foreign / "dear.jpg").exists()


@pytest.mark.parametrize("from_scratch", [False, True])
def test_the_two_starts_do_not_mix(tmp_path, fake_road, from_scratch):
    out = tmp_path / "out"
    quickstart(str(out), from_scratch=from_scratch)
    with pytest.raises(UserError, match="holds a run that started from"):
        quickstart(str(out), from_scratch=not from_scratch)
    quickstart(str(out), from_scratch=not from_scratch, fresh=True)


# ---- the real thing, small


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_end_to_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "CONFIGS", small_configs(tmp_path / "configs", from_scratch=True))
    photos = small_photos(tmp_path / "photos")
    monkeypatch.setattr(module, "TRAIN", photos)
    monkeypatch.setattr(module, "VAL", photos)
    out = tmp_path / "out"
    quickstart(str(out), from_scratch=True)
    shown = capfd.readouterr().out
    assert "Done in" in shown
    for name in ("reconstructions.png", "samples.png", "previews.png", "layout.png"):
        assert str(out / name) in shown
        Image.open(out / name).verify()

    pipe = DARPipeline.from_pretrained(out / "pipeline")
    assert len(pipe.classes) == pipe.ar.config.num_classes == 14
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (28, 64, 64, 3)
        assert samples["labels"].tolist() == [label for label in range(14) for _ in range(2)]
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"psnr", "codebook_use"} <= metrics["reconstruction"].keys()
    assert "FD-color_edges" in metrics["generation"]
    assert set(metrics["seconds"]) == {stage.name for stage in road(out, from_scratch=True)}
    assert metrics["losses"]["ar"]["train/loss"] > 0
    assert metrics["losses"]["tokenizer"]["val/flow"] > 0

    quickstart(str(out), from_scratch=True)
    again = capfd.readouterr().out
    assert again.count("done already") == len(road(out, from_scratch=True))
    assert "$ dar" not in again
