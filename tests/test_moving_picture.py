"""The moving picture of the README and of the site's first page is what the command beside it draws."""

import runpy
from pathlib import Path

import numpy as np
from PIL import Image

from dar_lightning.cli import main as dar

ROOT = Path(__file__).parents[1]
FIGURES = runpy.run_path(str(ROOT / "docs/figures.py"))
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "tour.md"))]


def frames(path: Path, step: int = 1) -> np.ndarray:
    with Image.open(path) as film:
        shown = []
        for number in range(0, film.n_frames, step):
            film.seek(number)
            shown.append(np.asarray(film.convert("RGB")).astype(int))
    return np.stack(shown)


def test_every_page_shows_the_same_command_and_picture():
    assert len({" ".join(FIGURES["first_command"](page)) for page in PAGES}) == 1
    assert all("images/stream.webp)" in page.read_text() for page in PAGES)
    assert (ROOT / "docs/images/stream.webp").stat().st_size < 2_000_000


def test_the_shipped_weights_draw_it_again(tmp_path):
    """Three of its pictures. Another CPU rounds otherwise, after which a token may be another: most are the same."""
    words = FIGURES["first_command"](PAGES[0])
    few = ",".join(words[words.index("--classes") + 1].split(",")[:3])
    dar([*words, f"--output={tmp_path}", f"--classes={few}", "--frames=1"])  # the previews alone
    shown, drawn = frames(ROOT / "docs/images/stream.webp", 4), frames(tmp_path / "stream.webp")
    assert len(shown) == len(drawn) == 8
    places = [np.s_[:, 4:132, 4 + 132 * i : 132 + 132 * i] for i in range(4)]
    errors = [np.abs(shown[place] - drawn[place]).mean() for place in places[:3]]
    assert np.median(errors) < 4, errors
    assert np.abs(shown[places[0]] - shown[places[1]]).mean() > 20
