"""Every `dar` command that we show somebody parses and every link to ours leads somewhere; and whole sections run."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from dar_lightning import ARModel, DARPipeline
from dar_lightning.ar.sampling import generate
from dar_lightning.cli import TRAINER_VERBS, USAGE, VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """The words after `dar` of each line that starts with it, comments and what follows a pipe left out."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if match := re.match(r"\s*(?:[$#>]\s*)*(?:Run: )?(?:\.venv/bin/)?dar\s+([a-z].*)", line):
            words = shlex.split(match[1], comments=True)
            ends = [i for i, word in enumerate(words) if word in ("|", "&&", ">", ";", "&")]
            found.append(words[: ends[0] if ends else None])
    return found


def shown() -> dict[str, list[str]]:
    """The commands that differ, by where one is first and what it is."""
    texts = {page: "\n".join(re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), flags=re.DOTALL)) for page in PAGES}
    for path in (ROOT / "experiments").rglob("*.yaml"):
        texts[path] = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    places = {str(path.relative_to(ROOT)): commands(text) for path, text in texts.items()}
    places["dar --help"] = [shlex.split(command) for command in re.findall(r": dar (fit .*)", USAGE)]
    first: dict[str, str] = {}
    for place, many in places.items():
        for words in many:
            first.setdefault(shlex.join(words), place)
    return {f"{place}: dar {command}": shlex.split(command) for command, place in first.items()}


SHOWN = shown()


def test_the_reader_finds_commands():
    text = "$ dar fit --config a.yaml \\\n   --x 1  # why\nnot dar fit\n# Run: dar sample --y 2\n"
    text += ".venv/bin/dar export | cat\n"
    assert commands(text) == [["fit", "--config", "a.yaml", "--x", "1"], ["sample", "--y", "2"], ["export"]]
    assert len(SHOWN) > 90


@pytest.mark.parametrize("name", SHOWN)
def test_commands_parse(name, monkeypatch, capsys):
    verb, *options = SHOWN[name]
    assert verb in (*TRAINER_VERBS, *VERBS)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([verb, *options, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_our_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|(?:src|href)=\"([^\"#]+)\"", page.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not (page.parent / link).exists()] == []


PAGE = (Path(__file__).parents[1] / "docs/elsewhere.md").read_text()
SECTION = re.split(r"(?m)^##+ ", PAGE.split("## In transformers\n")[1])[0]


def test_drawing_with_transformers_and_decoding_here(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names, found = {}, []
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", SECTION, flags=re.DOTALL):
        if language == "bash":
            main(shlex.split(text, comments=True)[1:])
        else:
            exec(text, names)
            found.append((names["codes"], names.get("images")))
    alone, decoded, guided = found
    assert alone[0].shape == (2, 64)
    assert alone[0].max() < 1024
    assert decoded[1].shape == (2, 3, 64, 64)
    pipe = DARPipeline.from_pretrained("fruit64").to(torch.float32)
    labels = torch.tensor([pipe.label("Orange"), pipe.label("Watermelon")])
    ours = generate(pipe.ar, labels, guidance=(1.1, 3.0), generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided[0], ours)
    assert guided[1].shape == (2, 3, 64, 64)

    with torch.no_grad():
        labels, codes = torch.arange(15)[:, None], ours[:1].expand(15, -1)
        expected = pipe.ar(labels[:, 0], codes)
        logits = names["llama"](input_ids=torch.cat([1024 + labels, codes[:, :-1]], dim=1)).logits[..., :1024]
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max(), "the page says so"
    weights = ARModel.from_pretrained("fruit64").state_dict()
    again = ARModel.from_pretrained("runs/fruit64_ar").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


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
    rows = re.findall(r"^(\w+) +to do +\d+ +(\d+) +\d+$", run("--plan").stdout, re.MULTILINE)
    hours = {name: int(of) for name, of in rows}
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
