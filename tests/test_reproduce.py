"""experiments/reproduce.sh: its plan, commands that parse, steps skipped when done, and where it stops."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dar_lightning.cli import main

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments/reproduce.sh"
FILES = [f"ILSVRC2012_{name}" for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")]
FILES += ["VIRTUAL_imagenet256_labeled.npz"]
# In the place of `dar`: notes its words, fails once where a file says so, leaves what the real one would leave.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> calls
case "$*" in *"$(cat broken)"*) exit 3 ;; esac
while [[ $# -gt 0 ]]; do
    if [[ $1 == --output ]]; then mkdir -p "$2"; touch "$2"/{index.json,config.json,table.md}; fi
    shift
done
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *words], env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my files").mkdir()
    for name in FILES:
        (tmp_path / "my files" / name).touch()
    (tmp_path / "stand_in").write_text(STAND_IN)
    (tmp_path / "broken").write_text("experiments/ar/L.yaml")
    monkeypatch.setenv("DAR", f"bash {tmp_path / 'stand_in'}")
    monkeypatch.setenv("DOWNLOADS", "my files")
    return tmp_path


def planned(*words: str) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^    dar (.*)", run("--plan", *words).stdout, re.MULTILINE)]


def test_the_plan_says_what_it_takes_and_runs_nothing(folder):
    said = run("--plan").stdout
    assert not (folder / "calls").exists()
    rows = re.findall(r"^(\w+) +(to do|done) +(\d+) +(\d+) +(\d+)$", said, re.MULTILINE)
    assert {"tokenizer", *(f"model_{size}" for size in ("B", "L", "XL", "XXL"))} <= {name for name, *_ in rows}
    disk, hours = (sum(int(row[i]) for row in rows) for i in (2, 3))
    assert f"{disk} GB of disk" in said
    assert f"{hours} hours of one H100; all estimates" in said


def test_its_hours_are_those_of_the_recipes(folder):
    """A recipe's header gives hours on 8 GPUs, the plan of one."""
    hours = {
        name: int(of) for name, of in re.findall(r"^(\w+) +to do +\d+ +(\d+) +\d+$", run("--plan").stdout, re.MULTILINE)
    }
    recipes = {"tokenizer": "tokenizer/v1", "codebook4096": "tokenizer/codebook4096"}
    recipes |= {f"model_{size}": f"ar/{size}" for size in ("B", "L", "XL", "XXL")}
    for step, recipe in recipes.items():
        header = (ROOT / f"experiments/{recipe}.yaml").read_text()
        (told,) = re.findall(r"^# .*Time: estimate, (\d+) hours on 8 H100", header, re.MULTILINE)
        assert hours[step] == 8 * int(told), step


def test_its_commands_parse(folder, capsys):
    """One of each kind: other sizes and sweeps differ in names of files, which are all there."""
    commands = planned("--ablations")
    assert len(commands) > 20
    named = {word for command in commands for word in command if word.startswith("experiments/")}
    assert [name for name in named if not (ROOT / name).exists()] == []
    kinds = {(verb, *(word for word in words if word.startswith("--"))): [verb, *words] for verb, *words in commands}
    layers = {str(command): command for command in planned("--rehearse") if command[0] == "fit"}
    for verb, *options in [*kinds.values(), *[*layers.values()][:3]]:
        with pytest.raises(SystemExit) as stop:
            main([verb, *options, "--print_config"])
        assert stop.value.code == 0, (verb, options, capsys.readouterr().err)


def test_it_stops_at_a_failure_and_goes_on_with_what_is_missing(folder):
    first = run()
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1] == "reproduce.sh: model_L stopped with status 3; the same command goes on"
    done = (folder / "calls").read_text().splitlines()
    assert "experiments/ar/L.yaml" in done[-1]
    assert "table_guidance_B       done" in run("--plan").stdout

    (folder / "broken").write_text("nothing of that name")
    assert run().returncode == 0
    calls = (folder / "calls").read_text().splitlines()
    assert calls[: len(done) - 1] + calls[len(done) :] == [" ".join(command) for command in planned()]
    assert run().stdout.count("done already") == 15
    assert (folder / "calls").read_text().splitlines() == calls


def test_what_is_missing_is_one_line(folder):
    (folder / "my files" / FILES[3]).unlink()
    said = run()
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert f"{FILES[3]} is missing: need it in DOWNLOADS" in said.stderr
    assert "is no option" in run("--plann").stderr
