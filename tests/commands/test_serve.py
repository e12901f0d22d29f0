"""The page itself, with a small model that can be made to wait: over Gradio's client, and in a browser."""

import base64
import io
import re
import shutil
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_models import GROUPS, TOKENS, make_pipeline, picture

from benchmarks.serve import visit
from dar_lightning.commands import serve_page
from dar_lightning.commands.serve import serve
from dar_lightning.commands.serve_edit import VERSIONS
from dar_lightning.commands.serve_pictures import CSS, draw_several, enlarge
from dar_lightning.data.decode import MAX_PIXELS
from dar_lightning.generation.drawing import Job
from dar_lightning.generation.editing import draw_alike, middle, read_photo, tokenize
from dar_lightning.generation.grids import MIN_SIDE, to_image

gradio = pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
client = pytest.importorskip("gradio_client")

INPUTS = {"label": 1, "seed": 3, "guidance": 2, "path": None, "prefix": 2}
MANY_PIXELS = f"the photo cannot be read: more than {MAX_PIXELS} pixels"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# It runs as root in containers, and should ask nobody for anything.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# Whether an image is black all over.
BLACK = """image => {
    const canvas = document.createElement('canvas');
    canvas.getContext('2d').drawImage(image, 0, 0);
    return !canvas.getContext('2d').getImageData(0, 0, 32, 32).data.some((value, i) => i % 4 < 3 && value > 0);
}"""
# Note each picture that is shown.
WATCH = """() => {
    window.sources = [];
    const look = () => {
        const source = document.querySelector('#picture img')?.src;
        if (source && source !== window.sources.at(-1)) window.sources.push(source);
    };
    new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.02)


class Page:
    """A page that is being served, and how many tokens its model has written."""

    def __init__(self):
        self.pipe, self.steps, self.delay = make_pipeline(), [], 0.0
        original = self.pipe.ar.step

        def step(*args):
            time.sleep(self.delay)
            self.steps.append(1)
            return original(*args)

        self.pipe.ar.step = step
        self.page = serve_page.build_page(gradio, self.pipe, "tiny", max_upload_mb=1, work=serve_page.Work())
        self.page.queue(max_size=2, default_concurrency_limit=1)
        # a port that is free, so that the tests can run beside a page
        options = {"server_name": "127.0.0.1", "prevent_thread_lock": True, "quiet": True, "css": CSS}
        self.url = self.page.launch(**options, max_file_size=2**20)[1]

    def client(self):
        return client.Client(self.url, verbose=False, download_files=False)


@pytest.fixture(scope="module")
def page():
    served = Page()
    yield served
    served.page.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, str]:
    """What is wrong with it, or "good" -> a file."""
    folder = tmp_path_factory.mktemp("photos")
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b""), b"IEND": b""}  # of its pixels, none has been written
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    ]
    contents = {"text": b"no picture", "pixels": b"\x89PNG\r\n\x1a\n" + b"".join(parts)}
    contents |= {"large": bytes(1_040_000), "far above": bytes(1_200_000)}
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    picture(2).resize((60, 40)).save(folder / "good.png")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.mark.slow
def test_previews_arrive_one_by_one(page):
    states = list(page.client().submit(**INPUTS, api_name="/draw"))
    assert [strip.count("<img") for _, strip, *_ in states] == [1, 2, 3, 4]
    tokens = [html.count("written") for _, _, html, *_ in states]
    assert tokens == [TOKENS // GROUPS * group for group in (1, 2, 3, 4)]
    assert "--classes 1 " in states[0][3]
    assert "--seed 3 " in states[0][3]


@pytest.mark.slow
def test_bad_input_gets_one_message(page, photos):
    visitor = page.client()
    for change, message in (
        ({"seed": -1}, "the seed is -1: give a whole number from 0 to 2147483647"),
        ({"seed": None}, "the seed is None: give a whole number from 0 to 2147483647"),
        ({"path": client.handle_file(photos["text"])}, "the photo cannot be read: not an image of a known format"),
        ({"path": client.handle_file(photos["large"])}, "the photo has 1.0 MB: at most 1 MB are read"),
    ):
        with pytest.raises(client.exceptions.AppError) as raised:
            visitor.predict(**INPUTS | change, api_name="/draw")
        assert str(raised.value) == message
    with pytest.raises(client.exceptions.AppError, match=MANY_PIXELS):
        visitor.predict(client.handle_file(photos["pixels"]), api_name="/reconstruct")
    edit = {"label": 1, "seed": 3, "guidance": 2, "schedule": "", "path": client.handle_file(photos["good"])}
    edit |= {"paint": None, "start": 2, "evidence": 8}
    assert visitor.predict(**edit, api_name="/edit").count("<img") == VERSIONS
    for change, message in (
        ({"path": None}, "drop a photo first"),
        ({"paint": {"mask": "data:,AAAA"}}, "the mask cannot be read: not an image of a known format"),
        ({"start": 9}, "Value 9 is greater than maximum value 3"),
    ):
        with pytest.raises(client.exceptions.AppError, match=message):
            visitor.predict(**edit | change, api_name="/edit")
    compared, _ = visitor.predict(client.handle_file(photos["good"]), api_name="/reconstruct")
    assert len(compared) == 2


@pytest.mark.slow
def test_a_visitor_who_stops_ends_the_work(page, monkeypatch):
    page.steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(page, "delay", 0.2)
        job = page.client().submit(**INPUTS, api_name="/draw")
        wait_for(lambda: page.steps)
        job.cancel()
        time.sleep(0.2 * TOKENS)  # in which the drawing would end
    assert len(page.steps) < TOKENS - 1
    assert len(list(page.client().submit(**INPUTS, api_name="/draw"))) == GROUPS, "the next visitor is served"


@pytest.mark.slow
def test_closed_tabs_are_worked_for_no_more(page, monkeypatch):
    """Neither the one whose picture is being drawn, nor the one that waits."""
    page.steps.clear()
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(page, "delay", 0.2)
        drawing = pool.submit(visit, page.url, 0, leave_after=2)
        wait_for(lambda: page.steps)
        waiting = visit(page.url, 1, leave_after=0)
        assert drawing.result().previews == 2
        assert waiting.previews == 0
        time.sleep(0.2 * TOKENS)  # in which one of them would be drawn
    assert len(page.steps) < TOKENS - 1
    assert visit(page.url, 2).previews == GROUPS, "the next visitor is served"


@pytest.mark.slow
def test_twenty_at_once_are_told_their_places_and_served(page, monkeypatch):
    monkeypatch.setattr(page, "delay", 0.01)
    monkeypatch.setattr(page.page._queue, "max_size", 20)
    with ThreadPoolExecutor(20) as pool:
        seen = list(pool.map(partial(visit, page.url), range(20)))
    assert [each.failure for each in seen] == [""] * 20
    assert [each.previews for each in seen] == [GROUPS] * 20
    places = [place for each in seen for place in each.queued[:1]]
    assert len(places) == 20
    assert max(place for place, _ in places) > 5
    assert all(1 <= place <= length <= 20 for place, length in places)


@pytest.mark.slow
def test_a_photo_that_was_cleaned_up_is_asked_for_again(page, photos):
    with open(photos["good"], "rb") as content:
        (path,) = httpx.post(f"{page.url}gradio_api/upload", files={"files": content}).json()
    assert visit(page.url, 0, path).failure == ""
    Path(path).unlink()
    assert serve_page.GONE in visit(page.url, 0, path).failure


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e '.[dev]'")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=path, args=FLAGS) as browser:
        yield browser


@pytest.fixture
def tab(browser, page):
    """The page, just opened."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(page.url)
    tab.wait_for_selector("#draw", timeout=60_000)
    tab.evaluate(WATCH)
    yield tab
    tab.close()


def difference(tab, source: str, expected: Image.Image) -> int:
    shown = Image.open(io.BytesIO(tab.request.get(source).body())).convert("RGB")
    return np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).max()


@pytest.mark.slow
def test_previews_and_a_layout_in_a_browser(page, tab, photos, monkeypatch):
    monkeypatch.setattr(page, "delay", 0.1)
    tab.get_by_text("Layout from a photo").click()
    tab.set_input_files("#photo input[type=file]", photos["good"])
    tab.wait_for_selector("#photo img")
    tab.fill("#seed input", "5")
    tab.click("#draw")
    wait_for(lambda: tab.locator("#tokens .written").count() == TOKENS)
    wait_for(lambda: len(tab.evaluate("window.sources")) >= GROUPS)
    sources = tab.evaluate("window.sources")
    kept = max(1, TOKENS // 16)  # unless told otherwise
    photo = read_photo(photos["good"])
    expected = [picture for picture, *_ in serve_page.draw_previews(page.pipe, 0, 5, 3.0, photo, kept)]
    assert len(sources) == len(set(sources)) == GROUPS
    assert max(difference(tab, *pair) for pair in zip(sources, expected, strict=True)) <= 1
    assert tab.locator("#picture img").evaluate("image => image.complete && image.naturalWidth") == expected[-1].width
    loaded = "[...document.querySelectorAll('#strip img')].filter(image => image.naturalWidth > 0).length"
    wait_for(lambda: tab.evaluate(loaded) == GROUPS)
    cells = tab.locator("#tokens .token.kept").all_inner_texts()
    assert cells == [str(code) for code in tokenize(page.pipe, photo)[0, :kept].tolist()]
    outline = tab.locator("#tokens .token.kept").first.evaluate("cell => getComputedStyle(cell).outlineWidth")
    assert outline == "2px"
    tab.get_by_text("Repeat it").click()
    wait_for(lambda: f"--seed 5 --guidance 3 --layout good.png --prefix {kept}" in tab.inner_text("#command"))

    page.steps.clear()
    tab.click("#draw")
    wait_for(lambda: page.steps)
    tab.click("#stop")
    time.sleep(2 * page.delay * TOKENS)  # in which a drawing would end
    assert len(page.steps) < TOKENS - 1


@pytest.mark.slow
def test_who_waits_sees_the_queue_in_a_browser(page, tab, monkeypatch):
    page.steps.clear()
    monkeypatch.setattr(page, "delay", 0.5)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(visit, page.url, 0)
        wait_for(lambda: page.steps)
        tab.click("#draw")
        wait_for(lambda: "queue: 1/1" in tab.inner_text("#picture"))
        assert first.result().failure == ""
    wait_for(lambda: tab.locator("#tokens .written").count() == TOKENS)


@pytest.mark.slow
def test_the_slider_shows_the_reconstruction_from_so_many_groups(page, tab, photos):
    def reconstruction() -> str:
        """Where the right one of the two compared pictures is to be had, if both are there."""
        sources = tab.eval_on_selector_all("#compared img", "images => images.map(image => image.src)")
        return sources[1] if len(sources) == 2 else ""

    tab.get_by_role("tab", name="Reconstruct").click()
    tab.set_input_files("#given input[type=file]", photos["good"])
    wait_for(reconstruction)
    expected = [*serve_page.reconstructions(page.pipe, read_photo(photos["good"]))][1:]
    sources = {GROUPS: reconstruction()}
    slider = tab.locator("#groups input[type=range]")
    for groups in range(1, GROUPS):
        slider.press("Home" if groups == 1 else "ArrowRight")
        wait_for(lambda: reconstruction() not in ("", *sources.values()))
        sources[groups] = reconstruction()
    assert max(difference(tab, source, expected[groups - 1]) for groups, source in sources.items()) <= 1

    box = slider.bounding_box()
    tab.mouse.click(box["x"] + 1, box["y"] + box["height"] / 2)
    wait_for(lambda: reconstruction() == sources[1])
    for typed in ("", "2.5", "0", str(GROUPS + 1)):
        tab.fill("#groups input[type=number]", typed)
        time.sleep(0.2)
    assert reconstruction() == sources[1], "not a number of groups yet"
    tab.fill("#groups input[type=number]", "3")
    wait_for(lambda: reconstruction() == sources[3])
    assert tab.locator(".toast-body").all_inner_texts() == []


@pytest.mark.slow
def test_mistakes_get_one_message_each(tab, photos):
    def only_message(message: str) -> None:
        """Wait for the message; look for others beside it or after it; close it."""
        messages = tab.locator(".toast-body")
        wait_for(lambda: message in " ".join(messages.all_inner_texts()))
        time.sleep(0.5)
        assert len(messages.all_inner_texts()) == 1
        tab.click(".toast-close")
        wait_for(lambda: messages.count() == 0)

    tab.get_by_role("tab", name="Reconstruct").click()
    tab.press("#groups input[type=range]", "Home")
    tab.press("#groups input[type=range]", "ArrowRight")
    only_message(serve_page.NO_PHOTO)
    tab.set_input_files("#given input[type=file]", photos["far above"])
    only_message('File(s) exceed the maximum allowed size of 1.0 Mb: "far above.png"')
    tab.set_input_files("#given input[type=file]", photos["pixels"])
    only_message(MANY_PIXELS)


@pytest.mark.slow
def test_a_draft_is_finished_and_varied_in_a_browser(page, tab):
    def offered() -> list[str]:
        return tab.eval_on_selector_all("#offers img", "images => images.map(image => image.src)")

    tab.fill("#seed input", "5")
    tab.click("#alike")
    wait_for(lambda: serve_page.NO_PICTURE in " ".join(tab.locator(".toast-body").all_inner_texts()))
    page.steps.clear()
    tab.click("#draft")
    expected = [*draw_several(page.pipe, serve_page.DRAFTS, serve_page.DRAFT_GROUP, 0, 5, 3.0)]
    wait_for(lambda: offered() == re.findall('src="([^"]*)"', expected[-1]))
    tab.locator("#offers figure").nth(6).click()
    wait_for(lambda: len(tab.evaluate("window.sources")) == GROUPS)
    *_, (finished, _, _, codes) = serve_page.draw_previews(page.pipe, 0, 5, 3.0, number=6)
    assert difference(tab, tab.evaluate("window.sources")[-1], finished) <= 1
    drafts = offered()
    tab.click("#alike")
    wait_for(lambda: offered() and offered() != drafts)
    jobs = [Job(0, number, torch.tensor(codes)) for number in range(7, 7 + serve_page.DRAFTS)]
    alike = [to_image(previews[-1]) for previews, _ in draw_alike(page.pipe, jobs, 6, 5, 0.5, serve_page.DRAFTS)]
    tab.locator("#offers figure").nth(2).click()
    wait_for(lambda: len(tab.evaluate("window.sources")) == GROUPS + 1)
    assert difference(tab, tab.evaluate("window.sources")[-1], enlarge(alike[2], serve_page.LARGE)) <= 1


@pytest.mark.slow
def test_what_is_painted_is_drawn_anew_in_a_browser(page, tab, photos):
    tab.get_by_role("tab", name="Edit").click()
    tab.click("#edit_draw")
    wait_for(lambda: "drop a photo first" in " ".join(tab.locator(".toast-body").all_inner_texts()))
    tab.set_input_files("#edit_photo input[type=file]", photos["good"])
    tab.wait_for_selector("#paint canvas")
    box = tab.locator("#paint canvas").bounding_box()
    for top in (0.2, 0.4):  # two strokes, of which the second does not take back the first
        tab.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + top * box["height"])
        tab.mouse.down()
        tab.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + top * box["height"], steps=5)
        tab.mouse.up()
    tab.click("#edit_draw")
    wait_for(lambda: tab.locator("#edited img").count() == VERSIONS)
    sources = tab.eval_on_selector_all("#edited img", "images => images.map(image => image.src)")
    contents = [base64.b64decode(source.partition(",")[2]) for source in sources]
    photo = np.asarray(enlarge(to_image(middle(page.pipe, read_photo(photos["good"]))), MIN_SIDE))
    for content in contents:
        kept = (np.asarray(Image.open(io.BytesIO(content))) == photo).all(axis=(1, 2))
        assert kept[[3 * row for row in (0, 6, 13, 24, 31)]].tolist() == [True, False, False, True, True]
    tab.click("#edit_clear")
    wait_for(lambda: tab.locator("#paint .mask").evaluate(BLACK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queue": 0}, "max_queue is 0: must be at least 1"),
        ({"max_upload_mb": -1}, "max_upload_mb is -1"),
        ({"root_path": "dar"}, "root_path is dar: need a path from /, or an address from http:// or https://"),
        ({"pipeline": "./nowhere"}, "nowhere is not a folder"),
    ],
)
def test_mistakes_in_the_options(options, message):
    refused(message, serve, **options)


def test_a_proxy_of_the_environment_that_knows_nothing_of_this_machine(pipeline, monkeypatch):
    shown = []

    def look(page) -> None:
        shown.append(httpx.get(page.local_url, trust_env=False).status_code)
        page.close(verbose=False)

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(gradio.Blocks, "block_thread", look)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve(pipeline, port=port, device="cpu")
    assert shown == [200]


def test_a_gradio_that_is_there_and_cannot_be_imported(monkeypatch):
    """As with a SOCKS proxy in the environment, which httpx needs another package for."""
    lacks = "Using SOCKS proxy, but the 'socksio' package is not installed."

    def find(self, name, *where):
        if name == "gradio":
            raise ImportError(lacks)

    monkeypatch.delitem(sys.modules, "gradio")
    monkeypatch.setattr(sys, "meta_path", [type("Finder", (), {"find_spec": find})(), *sys.meta_path])
    refused(f"^serve needs Gradio, which cannot be imported: {lacks}$", serve)


def test_a_port_that_is_taken(page):
    port = int(page.url.rstrip("/").rsplit(":", 1)[1])
    refused(rf"^host 127\.0\.0\.1, port {port}: cannot listen there", serve, port=port)
