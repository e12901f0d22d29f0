"""The house as docs/architecture.md describes it: who may import whom, which names are public, how large things are."""

import ast
import graphlib
import importlib
import os
import re
import subprocess
import sys
from functools import cache
from operator import attrgetter
from pathlib import Path

import pytest

import dar_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dar_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGE = ROOT / "docs" / "architecture.md"
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of the page, without its own heading."""
    text = PAGE.read_text().split(f"## {heading}\n", 1)[1]
    rows = [line for line in re.split(r"\n## ", text)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def room_names(cell: str) -> list[str]:
    """`data/prepare/`, `cli.py` -> data.prepare, cli."""
    return [name.removesuffix(".py").strip("/").replace("/", ".") for name in re.findall(r"`([^`]+)`", cell)]


ROOMS = {room_names(room)[0]: set(room_names(allowed)) for room, _, allowed, _ in table("Rooms")}
WITH_LIGHTNING = {room_names(room)[0] for room, _, _, lightning in table("Rooms") if lightning == "yes"}
LIMITS = {what: int(number) for what, number in table("Limits")}


def room_of(module: str) -> str:
    """The innermost room that holds a module: data.prepare, not data."""
    parts = module.split(".")[1:] or ["__init__"]
    return next(name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in ROOMS)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Every module that a file imports, all by their whole names; `from a import b` counts as a and as a.b."""
    tree = ast.parse(path.read_text(), str(path))
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


NAMES = {module_name(path): path for path in MODULES}


def rooms_reached(path: Path) -> set[str]:
    """The other rooms whose modules a file imports. The package itself, where `__version__` is, is none."""
    found = {room_of(name) for name in imports(path) if name in NAMES and name != "dar_lightning"}
    return found - {room_of(module_name(path))}


def test_the_import_reader_sees_every_form(tmp_path):
    (tmp_path / "file.py").write_text("import a.b as c\nfrom d import e\ndef f():\n    from g import h\n")
    assert imports(tmp_path / "file.py") == {"a.b", "d", "d.e", "g", "g.h"}
    assert imports(tmp_path / "file.py", inside_functions=False) == {"a.b", "d", "d.e"}


def test_imports_are_those_of_the_table():
    """Every file has a room, and a room's files import all that its row allows, and nothing else."""
    used = {room: set() for room in ROOMS}
    wrong = []
    for name, path in NAMES.items():
        room, reached = room_of(name), rooms_reached(path)
        used[room] |= reached
        wrong += [f"{name} imports {other}" for other in sorted(reached - ROOMS[room])]
        if room not in WITH_LIGHTNING:
            wrong += [f"{name} imports {each}" for each in sorted(imports(path)) if each.split(".")[0] in LIGHTNING]
    assert wrong == []
    assert {room: allowed - used[room] for room, allowed in ROOMS.items() if allowed - used[room]} == {}
    assert {room_of(name) for name in NAMES} == set(ROOMS)


def test_what_the_table_must_never_say():
    """Imports run one way. The models are plain torch and do not know each other; nothing imports the command line."""
    order = list(ROOMS)
    assert [(room, name) for i, room in enumerate(order) for name in ROOMS[room] if name not in order[:i]] == []
    assert not {"tokenizer", "ar"} & WITH_LIGHTNING
    assert not ROOMS["tokenizer"] & {"ar", "data", "training"}
    assert not ROOMS["ar"] & {"tokenizer", "data", "training"}
    assert [room for room, allowed in ROOMS.items() if "cli" in allowed] == ["__main__"]
    assert not any("commands" in allowed for allowed in ROOMS.values()), "cli imports a verb's module by its name"


def test_no_imports_run_in_a_circle_and_the_public_names_need_no_lightning():
    """So that every module can be the first that is imported, and the models are there at once."""
    graph = {name: imports(path, inside_functions=False) for name, path in NAMES.items()}
    graphlib.TopologicalSorter({name: found & NAMES.keys() - {name} for name, found in graph.items()}).prepare()
    reached, left = set(), {f"dar_lightning.{module}" for module in dar_lightning._MODULES.values()}
    while left:
        reached |= left
        left = {found for name in left for found in graph.get(name, ())} - reached
    assert "dar_lightning.tokenizer.model" in reached
    assert [name for name in reached if name.split(".")[0] in LIGHTNING] == []


def test_what_packages_export_has_a_docstring():
    modules = [importlib.import_module(name) for name, path in NAMES.items() if "\n__all__ = " in path.read_text()]
    found = {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__}
    assert len(found) > 25
    docs = {name: value.__doc__ or "" for name, value in found.items()}
    generated = [name for name, doc in docs.items() if doc.startswith(name.split(".")[-1] + "(")]  # of a dataclass
    assert [name for name, doc in docs.items() if not doc] + generated == []


@pytest.mark.parametrize("folder", ["dar_lightning", "tests", "benchmarks"])
def test_files_stay_few_short_and_named_for_one_idea(folder):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert [path for path, count in lines.items() if count > LIMITS[f"lines of a file in `{folder}/`"]] == []
    assert [path for path in lines if path.stem in ("utils", "util", "helpers", "misc", "common")] == []
    assert len(list(PACKAGE.glob("*.py"))) <= LIMITS["files in the root of the package"]


def test_the_page_names_files_that_exist():
    """Every path in backticks, from the package or from the root."""
    paths = re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|md|yaml))`", PAGE.read_text())
    assert [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()] == []


def test_no_large_file_is_tracked():
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    assert [path for path in paths if path.is_file() and path.stat().st_size > 10 * 2**20] == []


def make(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """As a user's shell would call it, although `make test` may be what runs this."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": False}
    return subprocess.run(["make", *arguments], **options)


@pytest.mark.parametrize(
    ("module", "owner", "names"),
    [
        ("dar_lightning", "ARConfig", "preset"),
        ("dar_lightning", "TokenizerConfig", "preset"),
        ("dar_lightning", "ARModel", "forward"),
        ("dar_lightning", "SequentialDiffusionTokenizer", "tokenize detokenize previews condition training_losses"),
        ("dar_lightning", "DARPipeline", "generate stream from_pretrained save_pretrained"),
        ("dar_lightning.ar", "sampling", "generate stream_tokens"),
        ("dar_lightning", "weights", "load_official_ar load_official_tokenizer"),
    ],
)
def test_public_names_stay(module, owner, names):
    importlib.import_module(f"{module}.{owner}" if owner.islower() else module)
    for name in names.split():
        assert callable(attrgetter(f"{owner}.{name}")(sys.modules[module])), name


def test_make_alone_lists_the_targets():
    targets = [line.split()[1] for line in make(folder=ROOT).stdout.splitlines()]
    assert targets == ["help", "install", "demo", "test", "lint", "docs", "format", "ci-tools", "clean"]


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "old-python"  # answers as Python 3.9 would
    program = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$2"\n')
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "overrides.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    run = make("demo", f"PYTHON={old}", folder=tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[0].startswith(f"dar_lightning needs Python 3.11 or newer, {old} is 3.9")
    assert not (tmp_path / ".venv").exists()
