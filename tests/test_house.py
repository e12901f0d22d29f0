"""The rules of the house: who may import whom, which names are public, and how large things may grow."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dar_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions, in full; `from a import b` counts as a and as a.b."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def reaching(paths: list[Path], *targets: str) -> list[str]:
    """The imports by which these files reach one of the targets or something inside it."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in sorted(imports(path))
        if any(name == target or name.startswith(f"{target}.") for target in targets)
    ]


def inside(folder: str) -> list[Path]:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files, f"dar_lightning/{folder} has no files"
    return files


def test_the_import_reader_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "pkg" / "sub" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b as c\nfrom .. import cli\nfrom .near import x\ndef f():\n    from d import e\n")
    assert imports(path) == {"a.b", "pkg", "pkg.cli", "pkg.sub.near", "pkg.sub.near.x", "d", "d.e"}


@pytest.mark.parametrize("folder", ["tokenizer", "ar"])
def test_models_are_plain_torch(folder):
    assert reaching(inside(folder), *LIGHTNING, "dar_lightning.lit", "dar_lightning.callbacks") == []


def test_ar_knows_nothing_of_the_tokenizer():
    assert reaching(inside("ar"), "dar_lightning.tokenizer", "dar_lightning.data", "dar_lightning.pipeline") == []


def test_nothing_imports_the_command_line():
    assert reaching([path for path in MODULES if path.name != "__main__.py"], "dar_lightning.cli") == []


def test_importing_the_models_loads_no_lightning():
    code = (
        "import sys, dar_lightning.tokenizer.model, dar_lightning.ar.model\n"
        f"print([name for name in sys.modules if name.split('.')[0] in {LIGHTNING}])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_module_can_be_the_first_that_is_imported():
    """One process forgets the package before each module: a circle of imports shows in some orders only."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "dar_lightning"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # of an extra that is not installed
        assert error.name.partition(".")[0] != "dar_lightning", error
"""
    names = [module_name(path) for path in MODULES if path.name != "__main__.py"]
    run = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_public_names():
    from dar_lightning import ARConfig, ARModel, DARPipeline, SequentialDiffusionTokenizer, TokenizerConfig
    from dar_lightning.ar.sampling import generate, stream_tokens
    from dar_lightning.weights import load_official_ar, load_official_tokenizer

    functions = [generate, stream_tokens, load_official_ar, load_official_tokenizer]
    methods = {
        SequentialDiffusionTokenizer: ["tokenize", "detokenize", "previews", "condition", "training_losses"],
        ARModel: ["forward"],
        DARPipeline: ["generate", "stream", "from_pretrained", "save_pretrained"],
        TokenizerConfig: ["preset"],
        ARConfig: ["preset"],
    }
    assert all(callable(function) for function in functions)
    assert [
        f"{owner.__name__}.{name}" for owner, names in methods.items() for name in names if not hasattr(owner, name)
    ] == []


def tracked() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_stay_short_and_named_for_one_idea():
    python = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
    long = {
        str(path.relative_to(ROOT)): lines for path in python if (lines := len(path.read_text().splitlines())) > 450
    }
    assert long == {}
    assert [path for path in python if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_no_large_file_is_tracked():
    assert [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 10 * 2**20] == []


def make(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """As a user's shell would call it, although `make test` may be what runs this."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_the_targets():
    run = make(folder=ROOT)
    targets = [line.split()[1] for line in run.stdout.splitlines()]
    assert targets == ["help", "install", "demo", "test", "lint", "format", "clean"]


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "old-python"  # answers as Python 3.9 would
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])" "$2"\n'
    )
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "overrides.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    run = make("demo", f"PYTHON={old}", folder=tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[0].startswith(f"dar_lightning needs Python 3.11 or newer, {old} is 3.9")
    assert not (tmp_path / ".venv").exists()
