"""Do the tests notice a broken line? Each mutant changes one line of the package, and its tests must fail.

The mutants are in mutants.yaml: a file, the tests that should notice, and pairs of old and new text. Each is applied to
a copy of the checkout, its tests run until one fails, and mutants.json says which survived and the share killed.

    python benchmarks/mutants.py [--only guidance.py] [--check 1] [--tree CHECKOUT] [--limit 900] [--output FILE.json]

`--check 1` only tells which old texts are not there exactly once. `--tree` is another checkout, to compare its tests.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.machine import RESULTS, ROOT, child_environment, describe, options, store

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "dist", "results", ".*_cache")


def mutants(only: list[str]) -> list[dict]:
    """Those whose file or texts hold one of these words."""
    groups = yaml.safe_load((Path(__file__).parent / "mutants.yaml").read_text())
    found = [
        {"file": group["file"], "old": old, "new": new, "tests": group["tests"]}
        for group in groups
        for old, new in group["mutants"]
    ]
    return [mutant for mutant in found if any(word in " ".join(map(str, mutant.values())) for word in only)]


def mutated(tree: Path, mutant: dict) -> str | None:
    """The file's text with the mutant in it, None where the old text is not there exactly once."""
    path = tree / mutant["file"]
    text = path.read_text() if path.is_file() else ""
    return text.replace(mutant["old"], mutant["new"]) if text.count(mutant["old"]) == 1 else None


def run(tree: Path, mutant: dict, limit: float) -> str:
    """Its tests: killed, survived or no tests."""
    path = tree / mutant["file"]
    before, text = path.read_text(), mutated(tree, mutant)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant["tests"].split()]
    try:
        path.write_text(text)
        where = {"cwd": tree, "env": child_environment(tree), "capture_output": True, "check": False}
        code = subprocess.run(command, timeout=limit, **where).returncode
    except subprocess.TimeoutExpired:  # a loop without an end is noticed, too
        code = 1
    finally:
        path.write_text(before)
    return {0: "survived", 1: "killed", 2: "killed"}.get(code, "no tests")


if __name__ == "__main__":
    given = options(__doc__, only=[""], check=0, tree=ROOT, limit=900.0, output=RESULTS / "mutants.json")
    chosen = mutants(given.only)
    gone = [mutant for mutant in chosen if mutated(given.tree, mutant) is None]
    for mutant in gone:
        print(f"no longer applies: {mutant['file']}: {mutant['old']!r}")
    for path in sorted({path for mutant in chosen for path in mutant["tests"].split()}):
        if not (given.tree / path).exists():
            print(f"no such tests: {path}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = shutil.copytree(given.tree, Path(folder) / "tree", ignore=LEFT_OUT)
        for mutant in [] if given.check else [mutant for mutant in chosen if mutant not in gone]:
            start = time.perf_counter()
            rows.append(mutant | {"outcome": run(tree, mutant, given.limit)})
            rows[-1]["seconds"] = round(time.perf_counter() - start, 1)
            print(f"{rows[-1]['outcome']:9} {mutant['file']}: {mutant['old']!r} -> {mutant['new']!r}", flush=True)
            killed = sum(row["outcome"] == "killed" for row in rows)
            result = {"what": "mutants of single lines that the tests notice", "machine": describe(), "killed": killed}
            store(given.output, result | {"mutants": len(rows), "share": round(killed / len(rows), 4), "rows": rows})
    sys.exit(bool(gone) or any(row["outcome"] != "killed" for row in rows))
