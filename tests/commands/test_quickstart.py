"""`dar quickstart`: its command lines parse, its stages keep time, fail in one line and are not done twice."""

import itertools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_quickstart import small_configs, small_photos
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dar_lightning.cli import main
from dar_lightning.commands import quickstart as module
from dar_lightning.commands.quickstart import Stage, quickstart, road, run_stage
from dar_lightning.errors import UserError
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

ROOT = Path(__file__).parents[2]
ROADS = {"on": road(Path("OUT"), from_scratch=False), "scratch": road(Path("OUT"), from_scratch=True)}
COMMANDS = {command: stage.name for stages in ROADS.values() for stage in stages for command in stage.commands}


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{name}-{command[0]}" for command, name in COMMANDS.items()])
@pytest.mark.filterwarnings("ignore")
def test_every_command_parses(command, monkeypatch, capsys):
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


def test_a_stage_counts_its_seconds_over_attempts_also_when_it_fails(tmp_path, capfd):
    failing = Stage("try", "nothing much", 0.1, tmp_path / "result.json", (("--version",), ("no-such-verb",)))
    seconds = [0]
    for _ in range(2):
        with pytest.raises(UserError, match="stage try stopped with status 2: the same command goes on from here"):
            run_stage(failing, tmp_path)
        seconds.append(json.loads((tmp_path / "seconds.json").read_text())["try"])
    assert seconds == sorted({*seconds})
    shown, errors = capfd.readouterr()
    assert shown.count("$ dar --version") == 2
    assert "no-such-verb" in errors


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


def test_the_two_starts_do_not_mix(tmp_path, fake_road):
    out = tmp_path / "out"
    quickstart(str(out), from_scratch=True)
    with pytest.raises(UserError, match="holds a run that started from"):
        quickstart(str(out))
    quickstart(str(out), fresh=True)
    with pytest.raises(UserError, match="holds a run that started from"):
        quickstart(str(out), from_scratch=True)


# ---- the real thing, small


def logged_steps(logs: Path) -> list[int]:
    """Of the training loss, over all attempts, in the order of writing."""
    events = [event for path in sorted(logs.glob("events.*")) for event in EventFileLoader(str(path)).Load()]
    return [event.step for event in events if any(value.tag == "train/loss" for value in event.summary.value)]


def stop_after_a_save(path: Path) -> None:
    """In a thread: ask this process to end, as a batch system does, when its training has saved."""
    end = time.monotonic() + 240
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_end_to_end(tmp_path, monkeypatch, capfd):
    """It is stopped in the first training, which goes on where it was. Other verbs than that run in this process."""
    steps = 30
    monkeypatch.setattr(module, "CONFIGS", small_configs(tmp_path / "configs", True, tokenizer_steps=steps))
    photos = small_photos(tmp_path / "photos")
    monkeypatch.setattr(module, "TRAIN", photos)
    monkeypatch.setattr(module, "VAL", photos)
    monkeypatch.chdir(ROOT)
    real_call = module.call

    def call(words: list[str], **options) -> tuple[int, int]:
        if "fit" in words and any("tokenizer.yaml" in word for word in words):
            return real_call(words, **options)
        main(words[3:])  # behind python -m dar_lightning
        return 0, 0

    monkeypatch.setattr(module, "call", call)
    out = tmp_path / "out"
    run = out / "tokenizer"
    thread = threading.Thread(target=stop_after_a_save, args=(run / "checkpoints/last.ckpt",))
    thread.start()
    with pytest.raises(SystemExit) as stop:
        quickstart(str(out), from_scratch=True)
    thread.join()
    assert stop.value.code == 128 + signal.SIGTERM
    shown = "".join(capfd.readouterr())
    stopped = int(re.search(r"SIGTERM: stopped after step (\d+), saved in", shown)[1])
    assert "SIGTERM: stage tokenizer stopped; start again to go on" in shown
    assert 4 <= stopped < steps

    quickstart(str(out), from_scratch=True)
    shown = capfd.readouterr().out
    logged = logged_steps(run / "logs")
    assert logged == sorted({*logged}), "no step was done twice"
    assert {*range(steps)} - {*logged} <= {stopped - 1}, "a stop comes before its step is logged"
    assert torch.load(run / "checkpoints/last.ckpt")["global_step"] == steps
    assert SequentialDiffusionTokenizer.from_pretrained(run / "weights").averaged
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
    assert set(metrics["seconds"]) == {stage.name for stage in ROADS["scratch"]}
    assert metrics["losses"]["ar"]["train/loss"] > 0
    assert metrics["losses"]["tokenizer"]["val/flow"] > 0

    quickstart(str(out), from_scratch=True)
    again = capfd.readouterr().out
    assert again.count("done already") == len(ROADS["scratch"])
    assert "$ dar" not in again
