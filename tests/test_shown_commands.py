"""Commands that pages name within sentences, and those of other programs: options, files and targets of make are there.

tests/test_readme.py parses what stands in blocks after `dar`.
"""

import io
import re
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

from dar_lightning.cli import TRAINER_VERBS, VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# What tests run, or programs of others. "sbatch" and "experiments/" hand what follows to `dar fit` on a cluster.
OTHERS = ("tensorboard", "pip", "twine", "source", ".venv/bin/jupyter", ".venv/bin/pre-commit", "sbatch", "torchrun")
FILES = re.compile(
    r"(?<![\w/.-])(?:experiments|benchmarks|data|docs|notebooks|tests)/[\w/.-]+\.(?:yaml|py|sh|ipynb|png)\b"
)
TARGETS = re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text())


def spans(text: str) -> list[str]:
    """What stands between backticks in a sentence, and each line of the blocks of shell commands."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [*lines, *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))]


def programs(name: str) -> list[list[str]]:
    """The words of each command of a program that the pages show, comments left out."""
    found = [re.split(r" +(?:&&|\||#) *", span.strip()) for page in PAGES for span in spans(page.read_text())]
    parts = [re.sub(r"^(?:[A-Z]+=\S+ )+", "", part) for parts in found for part in parts]
    return [part.split() for part in parts if part.split(" ")[0] == name and " " in part]


@cache
def options_of(verb: str) -> str:
    """What `dar VERB --help` says."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        main([verb, "--help"])
    return shown.getvalue()


def test_options_of_dar_are_there_wherever_they_are_named():
    wrong = []
    for _, verb, *words in programs("dar"):
        if not re.fullmatch("[a-z]+", verb):
            continue  # dar --help, dar fit|validate|test|predict
        assert verb in (*TRAINER_VERBS, *VERBS), verb
        named = [re.split(r"[=.+]", word)[0][2:].replace("-", "_") for word in words if word.startswith("--")]
        wrong += [(verb, name) for name in named if not re.search(rf"--{name}\b", options_of(verb))]
    assert wrong == []


def test_programs_of_ours_and_their_options_are_there():
    shown = programs("python")
    assert len(shown) > 40
    for _, *words in shown:
        if words[:2] == ["-m", "dar_lightning"] and words[2:]:
            assert words[2] in (*TRAINER_VERBS, *VERBS)  # tests/test_extend.py runs these
        elif words[0] == "-m" and words[1].startswith("benchmarks"):
            path = ROOT / words[1].replace(".", "/")
            source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
            check_options(words, source)
        elif "/" in words[0]:
            check_options(words, (ROOT / words[0]).read_text())
        else:
            assert (
                words[:2] in (["-m", "dar_lightning"], ["-m", "build"], ["-m", "zipfile"]) or words[0] == "evaluator.py"
            ), words


def check_options(words: list[str], source: str) -> None:
    for word in words:
        assert not word.startswith("--") or re.search(rf"\b{word[2:]}\b", source), words


def test_targets_of_make_and_files_that_are_named_are_there():
    assert {words[1] for words in programs("make") if words[1].isalpha()} <= {*TARGETS}
    named = {(page.name, name) for page in PAGES for name in FILES.findall(page.read_text())}
    assert len(named) > 100
    assert [(page, name) for page, name in sorted(named) if not exists(name)] == []


def exists(name: str) -> bool:
    """docs/architecture.md leaves out the package's folder."""
    return (ROOT / name).exists() or (ROOT / "dar_lightning" / name).exists()


def test_every_line_of_a_block_is_a_command_of_a_known_kind():
    """So that none is left out of these tests."""
    blocks = "\n".join(
        block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    )
    lines = [re.sub(r"^(?:[A-Z]+=\S+ )+", "", line) for line in re.sub(r"\\\n\s*", " ", blocks).splitlines()]
    known = ("dar", "python", "make", "experiments/reproduce.sh", "experiments/cluster/torchrun.sh", *OTHERS)
    assert [line for line in lines if line.strip() and line.split()[0] not in known] == []
