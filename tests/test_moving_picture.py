"""Every picture of the pages has a command that draws it again; the moving one is what the command beside it draws."""

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from dar_lightning.cli import main as dar

ROOT = Path(__file__).parents[1]
FIGURES = runpy.run_path(str(ROOT / "docs/figures.py"))
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "tour.md"))]


def first_command(page: Path) -> list[str]:
    """The words after `dar` of the first `dar sample` that a page shows."""
    line = re.search(r"^dar (sample .*)", page.read_text().replace("\\\n", " "), re.MULTILINE)[1]
    return shlex.split(line, comments=True)


def frames(path: Path, step: int = 1) -> np.ndarray:
    with Image.open(path) as film:
        shown = []
        for number in range(0, film.n_frames, step):
            film.seek(number)
            shown.append(np.asarray(film.convert("RGB")).astype(int))
    return np.stack(shown)


def test_every_page_shows_the_same_command_and_picture():
    (words,) = {tuple(first_command(page)) for page in PAGES}
    assert FIGURES["command_above"](PAGES[-1], "stream.webp") == [*words]
    assert all("images/stream.webp)" in page.read_text() for page in PAGES)
    assert (ROOT / "docs/images/stream.webp").stat().st_size < 2_000_000


def test_the_shipped_weights_draw_it_again(tmp_path):
    """Three of its pictures. Another CPU rounds otherwise, after which a token may be another: most are the same."""
    words = first_command(PAGES[0])
    few = ",".join(words[words.index("--classes") + 1].split(",")[:3])
    dar([*words, f"--output={tmp_path}", f"--classes={few}", "--frames=1"])  # the previews alone
    shown, drawn = frames(ROOT / "docs/images/stream.webp", 4), frames(tmp_path / "stream.webp")
    assert len(shown) == len(drawn) == 8
    places = [np.s_[:, 4:132, 4 + 132 * i : 132 + 132 * i] for i in range(4)]
    errors = [np.abs(shown[place] - drawn[place]).mean() for place in places[:3]]
    assert np.median(errors) < 4, errors
    assert np.abs(shown[places[0]] - shown[places[1]]).mean() > 20


def test_every_picture_has_a_command_that_draws_it_again():
    """docs/figures.py by the command above it, docs/screenshots.py, or the benchmark of editing."""
    for name, (page, _) in FIGURES["DRAWN"].items():
        assert FIGURES["command_above"](ROOT / "docs" / page, name)
    known = {*FIGURES["DRAWN"], "schedule.svg", "solver.svg", "inpainting_center.jpg", "inpainting_outside.jpg"}
    programs = "".join((ROOT / name).read_text() for name in ("docs/screenshots.py", "benchmarks/editing.py"))
    names = {path.name for path in (ROOT / "docs/images").iterdir()}
    assert [name for name in names - known if f'"{name}"' not in programs] == []
    assert known <= names
