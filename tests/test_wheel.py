"""The wheel holds all that commands of the docs name: they work without a clone; and a release agrees with itself."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import dar_lightning

ROOT = Path(__file__).parents[1]
PROGRAM = """
import io
from contextlib import redirect_stdout, suppress
from pathlib import Path

import dar_lightning
from dar_lightning.cli import main
from dar_lightning.commands import quickstart
from dar_lightning.data.shards import ShardIndex
from dar_lightning.files import find_shipped

def dar(*words):
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        main(words)
    return shown.getvalue()

def look(stage, out):
    named = [word.split("=")[-1] for words in stage.commands for word in words]
    files = [name for name in named if name.startswith(("experiments/", "data/"))]
    assert all(Path(find_shipped(name)).exists() for name in files), files
    seen.extend(files)

print(Path(dar_lightning.__file__).parent)
assert "max_steps: 360000" in dar("fit", "--config", "experiments/ar/B.yaml", "--print_config")
assert "cell" in dar("sweep", "experiments/sweeps/small/order.yaml", "--help")
assert "data/fruit64/train" in dar("sweep", "experiments/sweeps/small/order.yaml", "--dry_run")
assert ShardIndex.load("data/fruit64/train/{000000..000001}.tar").num_samples == 512
seen = []
quickstart.run_stage, quickstart.finish = look, lambda out: print("the end")
assert dar("quickstart").endswith("the end\\n")
assert len(seen) > 4, seen

configs = [f"--config=experiments/quickstart/{name}tokenizer.yaml" for name in ("", "finetune_")]
dar("fit", *configs, "--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.default_root_dir=run")
dar("sample", "--pipeline=fruit64", "--classes=Orange", "--layout=experiments/quickstart/layout.png", "--output=out")
"""


@pytest.mark.slow
def test_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    wheel = pytest.importorskip("hatchling.build").build_wheel(str(tmp_path))
    with ZipFile(tmp_path / wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path / "packages")
    trees = ("experiments", "data/fruit64", "data/emoji64")
    files = [path for tree in trees for path in (ROOT / tree).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {f"dar_lightning/shipped/{path.relative_to(ROOT)}" for path in files} <= names
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages")}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=empty, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == str(tmp_path / "packages/dar_lightning")
    assert (empty / "run/checkpoints/last.ckpt").is_file()
    assert (empty / "out/layout.png").is_file()


def test_versions_agree():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dar_lightning.__version__


def test_issue_templates_are_forms():
    templates = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    forms = [yaml.safe_load(path.read_text()) for path in templates]
    assert len(forms) == 3
    assert all({"name", "description", "body"} <= form.keys() for form in forms)


def test_every_data_set_in_the_wheel_is_in_the_notice():
    notice = (ROOT / "NOTICE").read_text()
    folders = [path.name for path in (ROOT / "data").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert [name for name in folders if name not in notice] == []


def test_the_pinned_versions_are_for_every_python_that_the_project_names():
    """A distribution's Python may be 3.11.2: of what is installed, nothing needs a later patch than pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    needs = {each.name: each.metadata["Requires-Python"] for each in distributions() if each.name.lower() in pinned}
    assert len(needs) > 50
    assert [name for name, need in needs.items() if not SpecifierSet(need or "").contains(oldest)] == []
