"""Provenance: what git, the libraries and the process themselves say, in every kind of result."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from tiny_models import fit_ar, make_tokenizer, write_images

from dar_lightning import __version__
from dar_lightning.cli import main
from dar_lightning.records import provenance


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.check_output(["git", *who, *words], cwd=folder, text=True).strip()


def repository(folder: Path) -> str:
    """Commit everything in a folder; the commit."""
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"of {folder.name}\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package in the place of this one, with a file."""
    folder = tmp_path / "venv/site-packages/dar_lightning"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("first = 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", folder)
    return folder


@pytest.mark.parametrize("path", [None, "notes.txt", "README.md", "dar_lightning/new.py", "dar_lightning/__init__.py"])
def test_a_checkout_is_asked_wherever_the_command_runs(package, path, tmp_path, monkeypatch):
    """It has changed with what git tracks, and with new modules."""
    commit, other = repository(package.parent), tmp_path / "other"
    assert repository(other) != commit
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as git's hooks have it
    monkeypatch.chdir(other)
    if path is not None:
        with (package.parent / path).open("a") as file:
            file.write("# more\n")
    code = provenance.read_code()
    assert (code["commit"], code["changed"]) == (commit, path not in (None, "notes.txt"))


@pytest.mark.parametrize("case", ["no git", "a git that hangs", "no repository", "installed inside of one"])
def test_without_a_commit_there_is_none(case, package, tmp_path, monkeypatch):
    if case == "installed inside of one":
        (tmp_path / ".gitignore").write_text("venv/\n")
        repository(tmp_path)
    if case.endswith(("git", "hangs")):
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if case == "a git that hangs":
        (tmp_path / "bin/git").write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
        (tmp_path / "bin/git").chmod(0o755)
        monkeypatch.setattr(provenance, "GIT_SECONDS", 0.2)
    code = provenance.read_code()
    assert (code["version"], code["commit"], code["changed"]) == (__version__, None, None)
    assert len(code["sha256"]) == 64


def test_the_hash_is_of_what_decides_results(package, tmp_path, monkeypatch):
    hashes = [provenance.read_code()["sha256"]]
    for path, text in (("README.md", "words"), ("config.json", "{}"), ("config.json", '{"a": 1}')):
        (package / path).write_text(text)
        hashes.append(provenance.read_code()["sha256"])
    (package / "config.json").rename(package / "other.json")
    hashes.append(provenance.read_code()["sha256"])
    monkeypatch.setattr(provenance, "PACKAGE", package.rename(tmp_path / "elsewhere"))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4
    assert provenance.read_code()["sha256"] == hashes[-1]


@pytest.mark.parametrize("program", ["/bin/dar", str(provenance.PACKAGE / "__main__.py")])
def test_the_command_is_as_one_types_it(program, monkeypatch):
    """`python -m dar_lightning` has the file of its module as its name."""
    monkeypatch.setattr(sys, "argv", [program, "fit", "--name=a b"])
    made = provenance.provenance(torch.device("cpu"), "bf16-mixed")
    assert (made["command"], made["precision"], made["device"][:5]) == ("dar fit '--name=a b'", "bf16-mixed", "cpu (")


@pytest.fixture(scope="module")
def made(tmp_path_factory, pipeline) -> Path:
    """A folder with one small result of every verb."""
    root = tmp_path_factory.mktemp("made")
    make_tokenizer().save_pretrained(root / "tokenizer")
    tokenizer, images = str(root / "tokenizer"), write_images(root / "images", 8)
    measure = ["--reference", images, "--features", "color_edges", "--device=cpu"]
    fid = {"tokenizer": tokenizer, "reference": images, "num_samples": 4, "features": "color_edges"}
    callbacks = [
        {"class_path": "GenerationFID", "init_args": fid},
        {"class_path": "LastStepCheckpoint", "init_args": {"save_last": True, "save_top_k": 0}},
    ]
    (root / "layer.yaml").write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
    codes = str(root / "codes")
    extract = ["extract", "--tokenizer", tokenizer, "--shards", images, "--output", codes, "--crops=center"]
    rows = ["--title=t", "--task=reconstruct", '--rows=[{"solver": "euler"}]', "--pipeline", tokenizer]
    draw = ["predict", "--model=dar_lightning.generation.predict.GenerationModule"]
    draw += [f"--model.init_args.pipeline={pipeline}", "--data=dar_lightning.generation.labels.LabelsDataModule"]
    draw += ["--data.init_args.num_images=4", "--trainer.callbacks+=SampleWriter"]
    draw += [f"--trainer.callbacks.output={root}/drawn.npz", "--trainer.accelerator=cpu"]
    for words in (
        [*extract, "--accelerator=cpu", "--devices=1"],
        [*fit_ar(codes, codes, root / "run", max_steps=1, val_check_interval=1), f"--config={root}/layer.yaml"],
        ["reconstruct", "--tokenizer", tokenizer, "--shards", images, "--output", root / "out", "--device=cpu"],
        ["sample", "--pipeline", pipeline, "--per_class=1", "--output", root / "out", "--device=cpu"],
        ["evaluate", "--samples", root / "out/samples.npz", *measure, "--output", root / "out/evaluation.json"],
        ["table", *rows, *measure, "--output", root / "table"],
        [*draw, f"--trainer.default_root_dir={root}"],
    ):
        main([str(word) for word in words])
    return root


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# File of a verb -> the precision it notes, and where in the file its provenance is.
RECORDS = {
    "run/logs/provenance.json": ("32-true", [0]),
    "run/evaluation/gFD-color_edges-0000001.json": ("32-true", ["protocol", "provenance"]),
    "codes/provenance.json": ("32-true", [0]),
    "out/reconstruction.json": ("float32", ["protocol", "provenance"]),
    "out/samples.json": ("float32", ["provenance"]),
    "out/evaluation.json": ("float32", ["protocol", "provenance"]),
    "out/evaluation.json of the samples": ("float32", ["protocol", "samples", "provenance"]),
    "table/table.json": ("float32", ["provenance"]),
    "table/table.json of a row": ("float32", ["rows", 0, "protocol", "provenance"]),
    "drawn.json": ("32-true", ["provenance", 0]),
}


@pytest.mark.parametrize("file", RECORDS)
def test_every_result_says_what_made_it(file, made):
    precision, steps = RECORDS[file]
    found = read(made / file.partition(" ")[0])
    for step in steps:
        found = found[step]
    assert found["code"]["commit"] == provenance.read_code()["commit"]
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["versions"]["lightning"] == lightning.__version__
    assert found["device"].startswith("cpu")
    assert found["precision"] == precision
    assert shlex.split(found["command"]) == sys.orig_argv, "the tests' own"


def test_a_resumed_run_lists_what_made_which_steps(made, tmp_path, monkeypatch):
    """The second part is of other code, the third one of the same."""
    codes, first = str(made / "codes"), made / "run/checkpoints/last.ckpt"
    monkeypatch.setattr(provenance, "_code_at_first_call", lambda: {"sha256": "other"})
    for steps, start in ((2, first), (3, "last")):
        words = fit_ar(codes, codes, tmp_path / "run", max_steps=steps, limit_val_batches=0)
        main([*map(str, words), f"--config={made}/layer.yaml", f"--ckpt_path={start}"])
    listed = read(tmp_path / "run/logs/provenance.json")
    assert [one["from_step"] for one in listed] == [0, 1]
    assert listed[0] == read(made / "run/logs/provenance.json")[0]
    assert listed[1]["code"] == {"sha256": "other"}
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt")["provenance"] == listed


def test_other_code_goes_on_with_an_extraction(made, tmp_path, monkeypatch, capsys):
    """Of two shards, one is made by the code at hand, and the other by other code."""
    source, output = tmp_path / "images", tmp_path / "codes"
    shutil.copytree(made / "images", source)
    (source / "index.json").unlink()
    shutil.copy(source / "000000.tar", source / "000001.tar")
    words = ["extract", f"--tokenizer={made}/tokenizer", f"--shards={source}", f"--output={output}", "--crops=center"]
    words += ["--accelerator=cpu", "--devices=1"]
    main(words)
    (output / "index.json").unlink()
    (output / "000001.safetensors").unlink()
    (mine,) = read(output / "provenance.json")
    other = mine["code"] | {"version": "9.8", "sha256": "0" * 64}
    monkeypatch.setattr(provenance, "_code_at_first_call", lambda: other)
    capsys.readouterr()
    main(words)
    before = provenance.code_name(mine["code"])
    line = f"{output}: 1 of 2 token shards are of {before}, the others will be of {provenance.code_name(other)}\n"
    assert capsys.readouterr().out.count(line) == 1
    assert read(output / "provenance.json") == [mine, mine | {"code": other}]
    assert read(output / "index.json")["samples"] == 16
