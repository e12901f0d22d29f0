"""What the page shows: the pictures of `dar sample`, tokens in their places, code that repeats them, photos refused."""

import asyncio
import base64
import io
import re
import shlex
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_models import GROUPS, SIZE, TOKENS, make_pipeline, picture

from dar_lightning.cli import main
from dar_lightning.commands.serve_edit import painted
from dar_lightning.commands.serve_limit import BodyLimit
from dar_lightning.commands.serve_page import Work, draw_previews, reconstructions, repeat
from dar_lightning.commands.serve_pictures import data_url, draw_several, tokens_html
from dar_lightning.data.transforms import to_float, to_tensor, to_uint8
from dar_lightning.devices import torch_dtype
from dar_lightning.generation.editing import read_photo
from dar_lightning.generation.pipeline import DARPipeline


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture
def photo(tmp_path) -> str:
    picture(5).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def small(image: Image.Image) -> np.ndarray:
    factor = image.width // SIZE
    return np.asarray(image)[::factor, ::factor].astype(int)


@pytest.mark.parametrize(("prefix", "dtype"), [(0, None), (3, "bfloat16")])
def test_the_page_draws_what_the_commands_that_it_offers_draw(pipeline, photo, tmp_path, prefix, dtype):
    pipe = DARPipeline.from_pretrained(pipeline).to(dtype=torch_dtype(dtype))
    pictures, strips, *_ = zip(*draw_previews(pipe, 2, 7, 3.0, read_photo(photo), prefix), strict=True)
    assert [strip.count("<img") for strip in strips] == [1, 2, 3, 4]
    assert len({picture.tobytes() for picture in pictures}) == GROUPS
    command, python = repeat(pipeline, 2, 7, 3.0, photo, prefix, dtype)

    words = shlex.split(command)
    assert words[:2] == ["dar", "sample"]
    main([*words[1:-1], str(tmp_path / "drawn")])
    drawn = np.asarray(Image.open(tmp_path / "drawn/images/002-0.png")).astype(int)
    assert np.abs(small(pictures[-1]) - drawn).max() <= 1

    names: dict = {}
    exec(python, names)
    again = to_uint8(names["image"])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(small(pictures[-1]) - again).max() <= 1
    kept = pipe.tokenizer.tokenize(to_float(to_tensor(picture(5))[None]))[0, :prefix].tolist()
    assert names["preview"].codes[0, :prefix].tolist() == kept


def test_reconstructions_begin_with_the_photo_and_end_with_all_tokens(pipe, photo):
    pictures = list(reconstructions(pipe, read_photo(photo)))
    assert [picture.size for picture in pictures] == [(384, 384)] * (1 + GROUPS)
    assert np.array_equal(small(pictures[0]), np.asarray(picture(5)))
    codes = pipe.tokenizer.tokenize(to_float(to_tensor(picture(5))[None]))
    for groups in (1, GROUPS):
        generator = torch.Generator().manual_seed(0)
        expected = pipe.tokenizer.detokenize(codes, groups=groups, generator=generator)
        expected = to_uint8(expected)[0].permute(1, 2, 0).numpy()
        assert np.abs(small(pictures[groups]) - expected).max() <= 1


def test_tokens_fill_in_from_the_first(pipe):
    page = tokens_html(pipe, [4, 0, 31], kept=2)
    cells = re.findall(r'class="(token[^"]*)"[^>]*>([^<]*)<', page)
    written = [("token written kept", "4"), ("token written kept", "0"), ("token written", "31")]
    assert cells == [*written, *[("token", "·")] * (TOKENS - 3)]
    assert page.count('class="group"') == GROUPS


def test_work_that_is_stopped_begins_no_step():
    work, log = Work(), []

    def drawing():
        try:
            log.append("begun")
            yield 1
            log.append("went on")
            yield 2
        finally:
            log.append("closed")

    steps = work.steps(drawing())
    assert next(steps) == 1
    work.stop()
    assert log == ["begun", "closed"]
    assert list(steps) == []
    other = threading.Thread(target=lambda: [log.append(number) for number in work.steps(drawing())], daemon=True)
    other.start()
    other.join(0.3)
    assert log == ["begun", "closed"], "another thread waits"
    work.step.release()
    other.join()
    assert log[2:] == ["begun", 1, "went on", 2, "closed"]


def test_drafts_are_previews_of_the_images_that_they_become(pipe, photo):
    first, second = draw_several(pipe, 3, 2, 2, 7, 3.0, read_photo(photo), 3)
    assert first.count("<img") == second.count("<img") == 3
    *_, (image, *_) = islice(draw_previews(pipe, 2, 7, 3.0, read_photo(photo), 3, number=1), 2)
    expected = small(image)
    shown = Image.open(io.BytesIO(base64.b64decode(re.findall('base64,([^"]*)"', second)[1])))
    assert np.abs(small(shown) - expected).max() <= 1
    _, python = repeat("x", 2, 7, 3.0, None, 0, number=1)
    assert "image_seed(7, 2, 1)" in python


def test_what_is_painted_becomes_a_mask(pipe):
    def paint(picture: Image.Image) -> dict[str, str]:
        return {"mask": data_url(picture)}

    black = Image.new("RGB", (SIZE, SIZE))
    assert painted(pipe, None) is painted(pipe, {"mask": ""}) is painted(pipe, paint(black)) is None
    black.paste("white", (0, 0, 8, SIZE))
    known = painted(pipe, paint(black))
    assert torch.equal(known, (torch.arange(SIZE) >= 8).expand(1, 1, SIZE, -1))
    for wrong in ("text", [1], {"mask": 3}, {"mask": "data:image/png;base64,AAAA"}, {"mask": "data:,?"}, {"no": 1}):
        refused(r"^the mask cannot be read: ", painted, pipe, wrong)
    refused(r"^the mask is 16x16 pixels: need the image's 32x32$", lambda: painted(pipe, paint(black.resize((16, 16)))))
    refused(r"^the mask is white all over", lambda: painted(pipe, paint(Image.new("RGB", (SIZE, SIZE), "white"))))


@pytest.mark.parametrize(
    ("said", "sent", "seen"),
    [
        ("8", [4, 4], ["http.request"] * 2),
        ("9", [4, 5], [413]),
        ("", [4, 4, 4], ["http.request"] * 2 + ["http.disconnect"]),
    ],
)
def test_large_requests_are_not_read(said, sent, seen):
    messages, log = iter([{"type": "http.request", "body": bytes(size)} for size in sent]), []

    async def app(scope, receive, send):
        for _ in sent:
            log.append((await receive())["type"])

    async def receive():
        return next(messages)

    async def send(message):
        log.extend([message["status"]] if "status" in message else [])

    headers = [(b"content-length", said.encode())] if said else []
    asyncio.run(BodyLimit(app, most=8)({"type": "http", "headers": headers}, receive, send))
    assert log == seen
