"""The shipped pipeline's page, as `dar serve` starts it by default: over HTTP, and in a browser."""

import io
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from browser import chromium
from PIL import Image
from served import Served, served, wait_for

from dar_lightning.commands.serve import NO_PHOTO
from dar_lightning.commands.serve_page import draw_previews, reconstructions
from dar_lightning.data.decode import MAX_PIXELS
from dar_lightning.generation.editing import read_photo, tokenize
from dar_lightning.generation.pipeline import DARPipeline

pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow

MAX_QUEUE = 8
KEPT = 4  # tokens of a photo that the page keeps, unless told otherwise
MANY_PIXELS = f"the photo cannot be read: more than {MAX_PIXELS} pixels"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """In the end, Ctrl-C ends it."""
    with served(tmp_path_factory.mktemp("served")) as page:
        yield page
        ends(page, signal.SIGINT)


def ends(page: Served, number: int) -> None:
    page.process.send_signal(number)
    assert page.process.wait(30) == 0
    assert "Traceback" not in page.log.read_text()
    assert not [path for path in page.files.rglob("*") if path.is_file()], "what visitors gave is gone"


@pytest.fixture(scope="module")
def pipe() -> DARPipeline:
    return DARPipeline.from_pretrained("fruit64")


@pytest.fixture(scope="module")
def photo(pipe, tmp_path_factory) -> str:
    """A fruit of another class, wider than it is high."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    *_, last = draw_previews(pipe, 13, 5, 3.0)
    last.picture.resize((240, 160)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def bad_photos(tmp_path_factory) -> dict[str, str]:
    """What is wrong with it -> a file."""
    folder = tmp_path_factory.mktemp("bad")
    contents = {"above": bytes(10_200_000), "far above": bytes(11_000_000), "pixels": png_header(20_000, 20_000)}
    for name, content in contents.items():
        (folder / f"{name}.png").write_bytes(content)
    return {name: str(folder / f"{name}.png") for name in contents}


def png_header(width: int, height: int) -> bytes:
    """A PNG of so many pixels, of which none has been written."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b""), b"IEND": b""}
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one.convert("RGB")).astype(int) - np.asarray(other.convert("RGB")))


def test_it_listens_on_this_machine_only(page):
    assert "D-AR: fruit64" in httpx.get(page.url).text
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", page.port)) != 0, "0.0.0.0 would answer on this address, too"


def test_an_upload_above_the_limit_is_cut_off(page, bad_photos):
    with Path(bad_photos["far above"]).open("rb") as content:
        answer = httpx.post(f"{page.url}/gradio_api/upload", files={"files": content}, timeout=60)
    assert answer.status_code == 413
    assert answer.text == f"File size exceeded maximum allowed size of {10 * 2**20} bytes."
    assert not list(page.files.rglob("*far above*"))


@pytest.mark.parametrize("api_name", ["/draw", "/reconstruct"])
def test_a_bad_photo_gets_one_line(page, bad_photos, api_name):
    for which, message in {"above": "the photo has 10.2 MB: at most 10 MB are read", "pixels": MANY_PIXELS}.items():
        inputs = {"path": client.handle_file(bad_photos[which])}
        if api_name == "/draw":
            inputs |= {"label": 1, "seed": 3, "guidance": 2, "prefix": 2}
        with pytest.raises(client.exceptions.AppError) as raised:
            client.Client(page.url, verbose=False, download_files=False).predict(**inputs, api_name=api_name)
        assert str(raised.value) == message
    assert "Traceback" not in page.log.read_text()


def test_a_service_manager_ends_it_although_drawings_wait(tmp_path, photo):
    with served(tmp_path) as page:
        with Path(photo).open("rb") as content:
            httpx.post(f"{page.url}/gradio_api/upload", files={"files": content}).raise_for_status()
        assert list(page.files.rglob("photo.png"))
        answers = ask_for_drawings(page, 20)
        accepted = sum(answer.status_code == 200 for answer in answers)
        assert MAX_QUEUE <= accepted <= MAX_QUEUE + 4, "those that wait, and the few that have been drawn meanwhile"
        refused = [answer for answer in answers if answer.status_code != 200]
        assert all(answer.status_code == 503 and "queue is full" in answer.text.lower() for answer in refused)
        ends(page, signal.SIGTERM)


def ask_for_drawings(page: Served, visitors: int) -> list[httpx.Response]:
    functions = httpx.get(f"{page.url}/config").json()["dependencies"]
    (number,) = [function["id"] for function in functions if function["api_name"] == "draw"]
    requests = [
        {"fn_index": number, "session_hash": f"visitor{seed}", "data": [1, seed, 3, None, 0]}
        for seed in range(visitors)
    ]
    return [httpx.post(f"{page.url}/gradio_api/queue/join", json=request, timeout=60) for request in requests]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser, page):
    """The page, just opened; it notes each picture that is shown."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(page.url)
    tab.wait_for_selector("#draw", timeout=60_000)
    tab.evaluate("""() => {
        window.sources = [];
        const look = () => {
            const source = document.querySelector('#picture img')?.src;
            if (source && source !== window.sources.at(-1)) window.sources.push(source);
        };
        new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
    }""")
    yield tab
    tab.close()


def fetch(tab, source: str) -> Image.Image:
    return Image.open(io.BytesIO(tab.request.get(source).body()))


def drawn(tab, pipe: DARPipeline) -> list[Image.Image]:
    """Click, wait for the last token, and return the pictures that the page has shown."""
    config = pipe.tokenizer.config
    tab.evaluate("window.sources.length = 0")
    tab.click("#draw")
    wait_for(lambda: len(tab.evaluate("window.sources")) >= config.num_groups)
    wait_for(lambda: tab.locator("#tokens .written").count() == config.num_tokens)
    return [fetch(tab, source) for source in tab.evaluate("window.sources")]


def test_previews_appear_one_by_one(tab, pipe, tmp_path):
    pictures = drawn(tab, pipe)
    expected = [state.picture for state in draw_previews(pipe, 0, 0, 3.0)]
    assert len(pictures) == len(expected) == pipe.tokenizer.config.num_groups
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert max(difference(*pair).max() for pair in zip(pictures, expected, strict=True)) <= 1

    tab.screenshot(path=tmp_path / "page.png")  # to be looked at
    image = tab.locator("#picture img")
    assert image.evaluate("image => image.complete && image.naturalWidth") == expected[-1].width
    seen = Image.open(io.BytesIO(image.screenshot()))
    size = (pipe.tokenizer.config.image_size,) * 2
    small = [picture.resize(size, Image.Resampling.BOX) for picture in (seen, *expected)]  # half a pixel aside or not
    errors = [difference(small[0], picture)[size[0] // 8 :].mean() for picture in small[1:]]  # below the label
    assert errors[-1] < 3, "what the screen shows is the last preview"
    assert min(errors[:-1]) > 2 * errors[-1]


def test_a_photo_gives_the_layout(tab, pipe, photo):
    tab.get_by_text("Layout from a photo").click()
    tab.set_input_files("#photo input[type=file]", photo)
    tab.wait_for_selector("#photo img")
    tab.fill("#seed input", "5")
    last = drawn(tab, pipe)[-1]

    read = read_photo(photo)
    *_, expected = draw_previews(pipe, 0, 5, 3.0, read, KEPT)
    *_, without = draw_previews(pipe, 0, 5, 3.0)
    assert difference(last, expected.picture).max() <= 1
    assert difference(last, without.picture).mean() > 10
    cells = tab.locator("#tokens .token").all_inner_texts()
    assert cells[:KEPT] == [str(code) for code in tokenize(pipe, read)[0, :KEPT].tolist()]
    assert tab.locator("#tokens .token[style*=outline]").count() == KEPT
    tab.get_by_text("Repeat it").click()
    wait_for(lambda: f"--seed 5 --guidance 3 --layout photo.png --prefix {KEPT}" in tab.inner_text("#command"))


def reconstruction(tab) -> str:
    """Where the right one of the two compared pictures is to be had, if both are there."""
    sources = tab.eval_on_selector_all("#compared img", "images => images.map(image => image.src)")
    return sources[1] if len(sources) == 2 else ""


def test_the_slider_shows_the_reconstruction_from_so_many_groups(page, tab, pipe, photo):
    tab.get_by_role("tab", name="Reconstruct").click()
    tab.set_input_files("#given input[type=file]", photo)
    wait_for(lambda: reconstruction(tab))
    expected = [*reconstructions(pipe, read_photo(photo))][1:]
    sources = {len(expected): reconstruction(tab)}
    slider = tab.locator("#groups input[type=range]")
    for groups in range(1, len(expected)):
        slider.press("Home" if groups == 1 else "ArrowRight")
        wait_for(lambda: reconstruction(tab) not in ("", *sources.values()))
        sources[groups] = reconstruction(tab)
    slider.press("End")
    wait_for(lambda: reconstruction(tab) == sources[len(expected)])
    for groups, source in sources.items():
        assert difference(fetch(tab, source), expected[groups - 1]).max() <= 1

    box = slider.bounding_box()
    tab.mouse.click(box["x"] + 1, box["y"] + box["height"] / 2)
    wait_for(lambda: reconstruction(tab) == sources[1])
    for typed in ("", "2.5", "0", str(len(expected) + 1)):
        tab.fill("#groups input[type=number]", typed)
        time.sleep(0.2)
    assert reconstruction(tab) == sources[1], "not a number of groups yet"
    tab.fill("#groups input[type=number]", "3")
    wait_for(lambda: reconstruction(tab) == sources[3])
    assert tab.locator(".toast-body").all_inner_texts() == []
    assert "Traceback" not in page.log.read_text()


def test_mistakes_get_one_message_each(tab, bad_photos):
    tab.get_by_text("Layout from a photo").click()
    tab.set_input_files("#photo input[type=file]", bad_photos["far above"])
    only_message(tab, 'File(s) exceed the maximum allowed size of 10.0 Mb: "far above.png"')
    tab.set_input_files("#photo input[type=file]", bad_photos["pixels"])
    tab.wait_for_selector("#photo img", state="attached")
    tab.click("#draw")
    only_message(tab, MANY_PIXELS)

    tab.get_by_role("tab", name="Reconstruct").click()
    tab.press("#groups input[type=range]", "Home")
    tab.press("#groups input[type=range]", "ArrowRight")
    only_message(tab, NO_PHOTO)
    tab.set_input_files("#given input[type=file]", bad_photos["far above"])
    only_message(tab, 'File(s) exceed the maximum allowed size of 10.0 Mb: "far above.png"')
    tab.set_input_files("#given input[type=file]", bad_photos["pixels"])
    only_message(tab, MANY_PIXELS)


def only_message(tab, message: str) -> None:
    """Wait for the message; look for others beside it or after it; close it."""
    messages = tab.locator(".toast-body")
    wait_for(lambda: message in " ".join(messages.all_inner_texts()))
    time.sleep(0.5)
    assert len(messages.all_inner_texts()) == 1
    tab.click(".toast-close")
    wait_for(lambda: messages.count() == 0)
