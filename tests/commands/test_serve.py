"""The page itself, with a model that can be made to wait: over Gradio's client, and its stop button in a browser."""

import threading
import time

import pytest
from browser import chromium
from served import wait_for
from tiny_models import GROUPS, TOKENS, make_pipeline, picture

from dar_lightning.commands.serve import CSS, build_page, serve
from dar_lightning.commands.serve_page import Work
from dar_lightning.errors import UserError

gradio = pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
client = pytest.importorskip("gradio_client")


class Page:
    """A page that is being served, and how many tokens its model has written."""

    def __init__(self):
        self.pipe, self.steps, self.pause = make_pipeline(), [], threading.Event()
        self.pause.set()
        original = self.pipe.ar.step

        def step(*args):
            self.pause.wait(20)
            self.steps.append(1)
            return original(*args)

        self.pipe.ar.step = step
        page = build_page(gradio, self.pipe, "tiny", max_upload_mb=1, work=Work())
        page.queue(max_size=2, default_concurrency_limit=1)
        # a port that is free, so that the tests can run beside a page
        launched = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, css=CSS)
        self.page, self.url = page, launched[1]

    def client(self):
        return client.Client(self.url, verbose=False)


@pytest.fixture(scope="module")
def page():
    served = Page()
    yield served
    served.page.close()


INPUTS = {"label": 1, "seed": 3, "guidance": 2, "path": None, "prefix": 2}


@pytest.mark.slow
def test_previews_arrive_one_by_one(page):
    job = page.client().submit(**INPUTS, api_name="/draw")
    states = list(job)
    assert len(states) == GROUPS
    assert [strip.count("<img") for _, strip, *_ in states] == [1, 2, 3, 4]
    tokens = [html.count("written") for _, _, html, *_ in states]
    assert tokens == [TOKENS // GROUPS * group for group in (1, 2, 3, 4)]
    assert "--classes 1 " in states[0][3]
    assert "--seed 3 " in states[0][3]


@pytest.mark.slow
def test_bad_input_gets_one_message(page, tmp_path):
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "large.png").write_bytes(bytes(1_200_000))
    for change, message in (
        ({"seed": -1}, "the seed is -1: give a whole number from 0"),
        ({"seed": None}, "the seed is None: give a whole number from 0"),
        ({"path": client.handle_file(tmp_path / "text.png")}, "the photo cannot be read"),
        ({"path": client.handle_file(tmp_path / "large.png")}, "the photo has 1.2 MB: at most 1 MB"),
    ):
        with pytest.raises(client.exceptions.AppError, match=message) as raised:
            page.client().predict(**INPUTS | change, api_name="/draw")
        assert "\n" not in str(raised.value).strip()


@pytest.mark.slow
def test_a_photo_is_reconstructed(page, tmp_path):
    picture(2).save(tmp_path / "photo.png")
    compared, _ = page.client().predict(client.handle_file(tmp_path / "photo.png"), api_name="/reconstruct")
    assert len(compared) == 2


@pytest.mark.slow
def test_stop_stops_the_work_and_the_queue_has_an_end(page):
    page.pause.clear()
    page.steps.clear()
    jobs = [page.client().submit(**INPUTS, api_name="/draw") for _ in range(5)]
    wait_for(lambda: sum(job.done() and job.exception() is not None for job in jobs) >= 1)
    refused = [job for job in jobs if job.done()]
    assert all("queue" in str(job.exception()).lower() for job in refused)
    for job in jobs:
        job.cancel()
    page.pause.set()
    time.sleep(1)
    assert len(page.steps) < 2 * (TOKENS - 1), "five drawings were asked for"
    assert len(list(page.client().submit(**INPUTS, api_name="/draw"))) == GROUPS, "the next visitor is served"


@pytest.mark.slow
def test_the_stop_button_stops_the_work(page):
    original = page.pipe.ar.step
    page.pipe.ar.step = lambda *args: time.sleep(0.1) or original(*args)
    try:
        with chromium() as browser:
            tab = browser.new_page(viewport={"width": 1400, "height": 900})
            tab.goto(page.url)
            page.steps.clear()
            tab.click("#draw", timeout=60_000)
            wait_for(lambda: page.steps)
            tab.click("#stop")
            time.sleep(3 * 0.1 * TOKENS)  # in which a drawing would end
            assert len(page.steps) < TOKENS - 1
    finally:
        page.pipe.ar.step = original


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queue": 0}, "max_queue is 0: it must be positive"),
        ({"max_upload_mb": -1}, "max_upload_mb is -1"),
        ({"pipeline": "./nowhere"}, "nowhere is not a folder"),
    ],
)
def test_mistakes_in_the_options(options, message):
    with pytest.raises(UserError, match=message):
        serve(**options)


def test_a_port_that_is_taken(page):
    port = int(page.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=rf"^host 127\.0\.0\.1, port {port}: cannot listen there"):
        serve(port=port)
