"""`dar serve --jacobi`: the page draws the tokens of drawing one by one, in every tab, and says how to repeat it."""

import pytest
import torch
from tiny_models import make_pipeline, picture

from dar_lightning.ar import sampling
from dar_lightning.cli import main
from dar_lightning.commands import serve as command
from dar_lightning.commands.serve_edit import VERSIONS
from dar_lightning.commands.serve_page import DRAFT_GROUP, DRAFTS, Work, build_page, draw_previews
from dar_lightning.commands.serve_pictures import draw_several
from dar_lightning.data.transforms import to_float
from dar_lightning.errors import UserError
from dar_lightning.generation.editing import middle, read_photo


def test_every_drawing_of_the_page(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
    picture(5).save(photo := str(tmp_path / "photo.png"))
    pipe, windows, draw = make_pipeline().to(torch.float64), [], sampling.draw_jacobi

    def noting(ar, drawing, window, bias):
        windows.append(window)
        return draw(ar, drawing, window, bias)

    monkeypatch.setattr(sampling, "draw_jacobi", noting)
    *_, (*_, one_by_one) = draw_previews(pipe, 1, 3, 2.0)
    *_, plain_drafts = draw_several(pipe, DRAFTS, DRAFT_GROUP, 1, 3, 2.0)
    edit = {"known": None, "start": 2, "evidence": 4.0, "image": to_float(middle(pipe, read_photo(photo))[None])}
    *_, plain_edit = draw_several(pipe, VERSIONS, pipe.num_groups, 1, 3, 2.0, **edit)
    assert windows == []
    page = build_page(gradio, pipe, "tiny", 1, Work(), jacobi=5)
    page = {each.fn.__name__: each.fn for each in page.fns.values() if each.fn is not None}
    *_, (_, _, _, told, python, (*_, codes)) = page["on_draw"](1, 3, 2.0, None, 0, "")
    *_, (drafts, _) = page["on_drafts"](1, 3, 2.0, None, 0, "")
    *_, edited = page["on_edit"](1, 3, 2.0, "", photo, None, 2, 4.0)
    assert (codes, drafts, edited) == (one_by_one, plain_drafts, plain_edit)
    assert windows == [5, 5, 5]
    assert "--jacobi 5" in told
    assert "guidance=2.0, jacobi=5, generator" in python


def test_a_window_that_there_is_not(pipeline, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
    monkeypatch.setattr(command, "build_page", None)
    with pytest.raises(UserError, match=r"^jacobi is 9: it must be 0 \(off\) or a window of up to 8 tokens$"):
        command.serve(pipeline, jacobi=9)
    with pytest.raises(SystemExit):
        main(["serve", f"--pipeline={pipeline}", "--jacobi=-1"])
    assert "jacobi is -1" in capsys.readouterr().err
