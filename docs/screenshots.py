"""Screenshots of these pages, by Chromium: python docs/screenshots.py [LOGDIR of a sweep that dar report has read]

Without LOGDIR the page of `dar serve` with the shipped weights (a minute of CPU), with it TensorBoard with those runs.
"""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex

IMAGES = Path(__file__).parent / "images"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PHOTO = 12  # of data/fruit64/val: oranges
MINUTE = 60_000  # in milliseconds


@contextmanager
def served(*command: str) -> Iterator[str]:
    """The address of a server that such a command starts; it is stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)])
    try:
        for _ in range(240):
            try:
                urlopen(f"http://127.0.0.1:{port}").close()
                break
            except URLError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@contextmanager
def browser(width: int, height: int) -> Iterator[Page]:
    """A tab of Chromium, so many pixels large."""
    path = next(filter(None, map(shutil.which, CHROMIUM)))
    with sync_playwright() as driver, driver.chromium.launch(executable_path=path, args=FLAGS) as chromium:
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(3 * MINUTE)
        yield page


def settle(page: Page, place: str, pictures: int) -> None:
    """Wait until a part of the page has so many pictures that have not changed for five seconds."""
    page.wait_for_function(f"document.querySelectorAll('{place} img').length == {pictures}")
    before = None
    while before != (now := page.inner_html(place)):
        before = now
        page.wait_for_timeout(5000)


def save(page: Page, name: str, full: bool) -> None:
    """What the tab shows, as a JPEG; with `full`, all of the page."""
    page.wait_for_timeout(1500)  # until animations have ended
    page.screenshot(path=IMAGES / name, type="jpeg", quality=85, full_page=full)


def dar_serve() -> None:
    """serve.jpg: drafts, one of them finished. serve_edit.jpg: a photo, painted over, and versions of it."""
    reader = ShardReader(ShardIndex.load("data/fruit64/val"))
    with served("dar_lightning", "serve", "--pipeline", "fruit64") as address, browser(1280, 800) as page:
        page.goto(address)
        page.wait_for_selector("#draw")
        page.click("#label input")
        page.get_by_role("option", name="Orange").click()
        page.click("#draft")
        settle(page, "#offers", 8)
        page.locator("#offers figure").nth(6).click()
        settle(page, "#strip", 8)
        save(page, "serve.jpg", full=True)

        page.get_by_role("tab", name="Edit").click()
        page.click("#edit_label input")
        page.get_by_role("option", name="Orange").click()
        photo = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": reader[PHOTO][2]["jpg"]}
        page.set_input_files("#edit_photo input[type=file]", photo)
        box = page.locator("#paint canvas").bounding_box()
        for top in (0.35, 0.45, 0.5):
            page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + top * box["height"])
            page.mouse.down()
            page.mouse.move(box["x"] + 0.65 * box["width"], box["y"] + top * box["height"], steps=5)
            page.mouse.up()
        page.click("#edit_draw")
        settle(page, "#edited", 4)
        save(page, "serve_edit.jpg", full=False)


def tensorboard(logdir: str) -> None:
    """tensorboard_sweep.jpg and tensorboard_hparams.jpg."""
    with served("tensorboard.main", "--logdir", logdir) as address, browser(1520, 960) as page:
        shots = (("custom_scalars", "tensorboard_sweep.jpg", 960), ("hparams", "tensorboard_hparams.jpg", 560))
        for tab, name, height in shots:
            page.set_viewport_size({"width": 1520, "height": height})
            page.goto(f"{address}/#{tab}")
            page.wait_for_timeout(15_000)  # it reads the logs meanwhile
            save(page, name, full=False)


if __name__ == "__main__":
    tensorboard(*sys.argv[1:]) if sys.argv[1:] else dar_serve()
