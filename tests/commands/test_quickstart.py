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
from refusals import refused
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from dar_lightning import DARPipeline, SequentialDiffusionTokenizer
from dar_lightning.cli import main
from dar_lightning.commands import quickstart as module
from dar_lightning.commands.quickstart import Stage, make_stages, quickstart, run_stage

ROOT = Path(__file__).parents[2]
RUNS = {"on": make_stages(Path("OUT"), from_scratch=False), "scratch": make_stages(Path("OUT"), from_scratch=True)}
COMMANDS = {tuple(command): stage.name for stages in RUNS.values() for stage in stages for command in stage.commands}


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{name}-{command[0]}" for command, name in COMMANDS.items()])
def test_every_command_parses(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    for name, given in itertools.pairwise(command):
        if name.startswith("--") and name != "--config":
            value = config
            for part in name[2:].split("."):
                value = value[part]
            assert str(value) == given


def test_the_two_starts():
    """From scratch nothing is drawn first, no training reads the shipped weights, and it takes longer."""
    on, scratch = ([stage.name for stage in stages] for stages in RUNS.values())
    assert on == ["shipped", *scratch]
    commands = [words for name in ("on", "scratch") for stage in RUNS[name] for words in stage.commands]
    fits = [" ".join(words) for words in commands if words[0] == "fit"]
    assert [line.count("finetune_") for line in fits] == [1, 1, 0, 0]
    assert sum(stage.minutes for stage in RUNS["on"]) < 10 < sum(stage.minutes for stage in RUNS["scratch"])
    (spaces,) = make_stages(Path("my own"), True)[1].commands
    assert spaces[2] == "my own/tokenizer/weights"


def test_a_stage_counts_its_seconds_over_attempts_also_when_it_fails(tmp_path, monkeypatch, capfd):
    codes = itertools.cycle([(0, 0), (2, 0)])
    monkeypatch.setattr(module, "call", lambda words: time.sleep(0.06) or next(codes))
    failing = Stage("try", 0.1, tmp_path / "result.json", "nothing much", [["--version"], ["no-such-verb"]])
    for attempt in (1, 2):
        refused("stage try stopped with status 2: the same command goes on from here", run_stage, failing, tmp_path)
        assert json.loads((tmp_path / "seconds.json").read_text())["try"] >= 0.1 * attempt
    assert capfd.readouterr().out.count("$ dar --version") == 2


@pytest.fixture
def fake_stages(monkeypatch) -> list[str]:
    """Three stages that only write their results; what ran is noted."""
    ran = []

    def run(stage: Stage, out: Path) -> None:
        ran.append(stage.name)
        stage.result.write_text("{}")

    def stages(out: Path, from_scratch: bool) -> list[Stage]:
        return [Stage(name, 0, out / f"{name}.json", "writes", []) for name in ("one", "two", "three")]

    monkeypatch.setattr(module, "make_stages", stages)
    monkeypatch.setattr(module, "run_stage", run)
    monkeypatch.setattr(module, "finish", lambda out: None)
    return ran


def test_finished_stages_are_skipped_unless_an_earlier_one_ran(tmp_path, fake_stages, capsys):
    out = tmp_path / "out"
    quickstart(str(out))
    assert fake_stages == ["one", "two", "three"]
    quickstart(str(out))
    assert fake_stages == ["one", "two", "three"]
    assert capsys.readouterr().out.count("done already") == 3
    (out / "two.json").unlink()
    quickstart(str(out))
    assert fake_stages[3:] == ["two", "three"]


def test_fresh_starts_over_and_deletes_only_its_own(tmp_path, fake_stages):
    out, foreign = tmp_path / "out", tmp_path / "photos"
    quickstart(str(out), from_scratch=True)
    (out / "old").touch()
    refused("holds a run that started from nothing", quickstart, str(out))
    quickstart(str(out), fresh=True)
    assert fake_stages[3:] == ["one", "two", "three"]
    assert not (out / "old").exists()
    refused("holds a run that started from the shipped weights", quickstart, str(out), from_scratch=True)
    foreign.mkdir()
    (foreign / "dear.jpg").touch()
    refused("holds other files: give a new folder", quickstart, str(foreign), fresh=True)
    assert (foreign / "dear.jpg").exists()


STEPS = 30
CALLBACKS = "dar_lightning.training.callbacks"
WIDTHS = dict(encoder_dim=32, encoder_depth=1, conditioner_dim=32, conditioner_depth=1, decoder_dim=32, head_dim=16)
SMALL = {"tokenizer": WIDTHS | {"decoder_depth": 1}, "ar": dict(dim=32, depth=1, num_heads=2)}


def write_layer(folder: Path, part: str) -> str:
    """A config over the one of a part: a narrow model, and few steps."""
    steps = STEPS if part == "tokenizer" else 8
    callbacks = {"LastStepCheckpoint": {"every_n_train_steps": 4, "save_last": True}, "EMA": {"decay": 0.5}}
    if part == "tokenizer":
        callbacks["CodebookWarmup"] = {"warmup_steps": 4, "collect_steps": 2}
    trainer = {"max_steps": steps, "val_check_interval": max(4, steps // 3), "limit_val_batches": 1}
    trainer |= {"accelerator": "cpu", "log_every_n_steps": 1}
    trainer["callbacks"] = [{"class_path": f"{CALLBACKS}.{name}", "init_args": callbacks[name]} for name in callbacks]
    model = {"init_args": {"config": SMALL[part], "optimizer": {"lr": 1e-3, "warmup_steps": 0}}}
    layer = {"trainer": trainer, "model": model, "data": {"init_args": {"batch_size": 4}}}
    (folder / f"{part}.yaml").write_text(yaml.safe_dump(layer))
    return str(folder / f"{part}.yaml")


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
def test_end_to_end(tmp_path, monkeypatch, capfd):
    """It is stopped in the first training, which goes on where it was; but for that stop, all is in this process."""
    monkeypatch.setattr(module, "TRAIN", module.VAL)
    monkeypatch.chdir(ROOT)
    layers, real_call = {part: write_layer(tmp_path, part) for part in SMALL}, module.call

    def call(words: list[str]) -> tuple[int, int]:
        verb, part = words[3], Path(words[5]).stem  # python -m dar_lightning fit --config FOLDER/PART.yaml
        more = {"sample": "--per_class=2", "reconstruct": "--num_exchanged=4", "evaluate": "--allow_duplicates=true"}
        words += ["--config", layers[part]] if verb == "fit" else [more[verb]] if verb in more else []
        if thread.ident is None:
            thread.start()
            return real_call(words)
        main(words[3:])
        return 0, 0

    monkeypatch.setattr(module, "call", call)
    out = tmp_path / "out"
    run = out / "tokenizer"
    thread = threading.Thread(target=stop_after_a_save, args=(run / "checkpoints/last.ckpt",))
    with pytest.raises(SystemExit) as stop:
        quickstart(str(out), from_scratch=True)
    thread.join()
    assert stop.value.code == 128 + signal.SIGTERM
    shown = "".join(capfd.readouterr())
    stopped = int(re.search(r"SIGTERM: stopped after step (\d+), saved in", shown)[1])
    assert "SIGTERM: stage tokenizer stopped; start again to go on" in shown
    assert 4 <= stopped < STEPS

    quickstart(str(out), from_scratch=True)
    shown = capfd.readouterr().out
    logged = logged_steps(run / "logs")
    assert logged == sorted({*logged}), "no step was done twice"
    assert {*range(STEPS)} - {*logged} <= {stopped - 1}, "a stop comes before its step is logged"
    assert torch.load(run / "checkpoints/last.ckpt")["global_step"] == STEPS
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
    assert set(metrics["seconds"]) == {stage.name for stage in RUNS["scratch"]}
    assert metrics["losses"]["ar"]["train/loss"] > 0
    assert metrics["losses"]["tokenizer"]["val/flow"] > 0
