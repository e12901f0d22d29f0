"""Every `dar` command that we show somebody parses, and every file of ours that a page links to is there."""

import re
import shlex
from pathlib import Path

import pytest

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
