"""Do the tests notice a broken line? Each mutant changes one line of the package, and its tests must fail.

The mutants are in mutants.yaml: a file, the tests that should notice, and pairs of old and new text. Each is applied to
a copy of the checkout, its tests run until one fails, and mutants.json says which survived. Tests that fail without a
mutant would prove nothing: each file is run once before, and the command ends where one fails.

    python benchmarks/mutants.py [--only guidance.py] [--check 1] [--tree CHECKOUT] [--limit 900] [--output FILE.json]

`--check 1` only tells which old texts are not there exactly once. `--tree` is another checkout, to compare its tests.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.machine import RESULTS, ROOT, child_environment, options, record

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "dist", ".*_cache")


def mutants(only: list[str]) -> list[dict]:
    """Those whose file or texts hold one of these words."""
    groups = yaml.safe_load((Path(__file__).parent / "mutants.yaml").read_text())
    found = [
        {"file": group["file"], "old": old, "new": new, "tests": group["tests"]}
        for group in groups
        for old, new in group["mutants"]
    ]
    return [mutant for mutant in found if any(word in " ".join(map(str, mutant.values())) for word in only)]


def applies(tree: Path, mutant: dict) -> bool:
    """Whether its old text is in its file exactly once."""
    path = tree / mutant["file"]
    return path.is_file() and path.read_text().count(mutant["old"]) == 1


def pytest(tree: Path, tests: str, limit: float) -> int:
    """The exit code of tests, run until one fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    where = {"cwd": tree, "env": child_environment(tree), "capture_output": True, "check": False}
    try:
        return subprocess.run(command, timeout=limit, **where).returncode
    except subprocess.TimeoutExpired:  # a loop without an end is noticed, too
        return 1


def outcomes(tree: Path, chosen: list[dict], limit: float) -> Iterator[dict]:
    """Each mutant: killed, survived or no tests."""
    for mutant in chosen:
        path, start = tree / mutant["file"], time.perf_counter()
        text = path.read_text()
        path.write_text(text.replace(mutant["old"], mutant["new"]))
        code = pytest(tree, mutant["tests"], limit)
        path.write_text(text)
        # 2: the tests cannot even be imported, which without the mutant they can
        outcome = {0: "survived", 1: "killed", 2: "killed"}.get(code, "no tests")
        yield {"outcome": outcome, **mutant, "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    given = options(__doc__, only=[""], check=0, tree=ROOT, limit=900.0, output=RESULTS / "mutants.json")
    asked = mutants(given.only)
    chosen = [mutant for mutant in asked if applies(given.tree, mutant)]
    files = sorted({path for mutant in chosen for path in mutant["tests"].split()})
    gone = [f"no longer applies: {each['file']}: {each['old']!r}" for each in asked if each not in chosen]
    gone += [f"no such tests: {path}" for path in files if not (given.tree / path).exists()]
    print(*gone, sep="\n", end="\n" * bool(gone))
    if given.check:
        sys.exit(bool(gone))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = shutil.copytree(given.tree, Path(folder) / "tree", ignore=LEFT_OUT)
        if failing := [path for path in files if pytest(tree, path, given.limit) != 0]:
            sys.exit(f"without a mutant fails: {', '.join(failing)}")
        rows = record(given.output, "mutants of single lines", outcomes(tree, chosen, given.limit))
    killed = sum(row["outcome"] == "killed" for row in rows)
    print(f"{killed} of {len(rows)} are killed")
    sys.exit(bool(gone) or killed < len(rows))
