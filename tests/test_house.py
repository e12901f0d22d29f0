"""The house as docs/architecture.md describes it: who may import whom, which names are public, how large things are."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dar_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGE = ROOT / "docs" / "architecture.md"
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


# ---- the table


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


# ---- what files import


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Every module that a file imports, in full; `from a import b` counts as a and as a.b."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    tree = ast.parse(path.read_text(), str(path))
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


NAMES = {module_name(path): path for path in MODULES}


def rooms_reached(path: Path) -> set[str]:
    """The other rooms whose modules a file imports. The package itself, where `__version__` is, is none."""
    found = {room_of(name) for name in imports(path) if name in NAMES and name != "dar_lightning"}
    return found - {room_of(module_name(path))}


def test_the_import_reader_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "pkg" / "sub" / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b as c\nfrom .. import cli\nfrom .near import x\ndef f():\n    from d import e\n")
    assert imports(path) == {"a.b", "pkg", "pkg.cli", "pkg.sub.near", "pkg.sub.near.x", "d", "d.e"}


def test_every_file_has_a_room():
    assert {room_of(name) for name in NAMES} == set(ROOMS)


def test_imports_go_where_the_table_allows():
    wrong = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in MODULES
        for room in sorted(rooms_reached(path) - ROOMS[room_of(module_name(path))])
    ]
    assert wrong == []


def test_the_table_allows_no_more_than_is_used():
    used = {room: set() for room in ROOMS}
    for path in MODULES:
        used[room_of(module_name(path))] |= rooms_reached(path)
    assert {room: allowed - used[room] for room, allowed in ROOMS.items() if allowed - used[room]} == {}


def test_imports_run_one_way():
    """Each room imports rooms that stand above it in the table."""
    order = list(ROOMS)
    wrong = [(room, name) for i, room in enumerate(order) for name in ROOMS[room] if name not in order[:i]]
    assert wrong == []


def test_rooms_without_lightning():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in MODULES
        if room_of(module_name(path)) not in WITH_LIGHTNING
        for name in sorted(imports(path))
        if name.split(".")[0] in LIGHTNING
    ]
    assert wrong == []


def test_what_the_table_must_never_say():
    """The models are plain torch and do not know each other; nothing but `python -m` imports the command line."""
    assert not {"tokenizer", "ar"} & WITH_LIGHTNING
    assert not ROOMS["tokenizer"] & {"ar", "data", "training"}
    assert not ROOMS["ar"] & {"tokenizer", "data", "training"}
    assert [room for room, allowed in ROOMS.items() if "cli" in allowed] == ["__main__"]
    assert not any("commands" in allowed for allowed in ROOMS.values()), "cli imports a verb's module by its name"


def test_importing_the_models_loads_no_lightning():
    code = f"""
import sys, dar_lightning.tokenizer.model, dar_lightning.ar.model
sys.exit(any(name.split(".")[0] in {LIGHTNING} for name in sys.modules))"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_imports_run_in_a_circle():
    """So that every module can be the first that is imported."""
    graph = {name: imports(path, inside_functions=False) & NAMES.keys() - {name} for name, path in NAMES.items()}
    graphlib.TopologicalSorter(graph).prepare()


# ---- names


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


def exported(path: Path) -> list[str]:
    """The names in a module's `__all__`."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def definition(path: Path, name: str) -> ast.AST | None:
    """Where a name of a module comes from: its function or class, in this file or in that which it is imported from."""
    for node in ast.parse(path.read_text()).body:
        if getattr(node, "name", None) == name:
            return node
        if isinstance(node, ast.ImportFrom) and any(name == (alias.asname or alias.name) for alias in node.names):
            return definition(NAMES[node.module], name)
    return None


def test_what_packages_export_has_a_docstring():
    found = {f"{module}.{name}": definition(path, name) for module, path in NAMES.items() for name in exported(path)}
    assert len(found) > 25
    assert [name for name, node in found.items() if node is None or not ast.get_docstring(node)] == []


# ---- sizes


def tracked() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_root_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= LIMITS["files in the root of the package"]


@pytest.mark.parametrize("folder", ["dar_lightning", "tests", "benchmarks"])
def test_files_stay_short(folder):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert [path for path, count in lines.items() if count > LIMITS[f"lines of a file in `{folder}/`"]] == []


def test_files_are_named_for_one_idea():
    python = [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))]
    assert [path for path in python if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_the_page_names_files_that_exist():
    """Every path in backticks, from the package or from the root."""
    paths = re.findall(r"`((?:[\w.]+/)+[\w.]*|\w+\.(?:py|md|yaml))`", PAGE.read_text())
    assert [path for path in paths if not (PACKAGE / path).exists() and not (ROOT / path).exists()] == []


def test_no_large_file_is_tracked():
    assert [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > 10 * 2**20] == []


# ---- make


def make(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """As a user's shell would call it, although `make test` may be what runs this."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_the_targets():
    run = make(folder=ROOT)
    targets = [line.split()[1] for line in run.stdout.splitlines()]
    assert targets == ["help", "install", "demo", "test", "lint", "docs", "format", "clean"]


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
