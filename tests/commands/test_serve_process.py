"""`dar serve` as a person starts it: on this machine only, uploads have a limit, and it ends when asked to."""

import signal
import socket
from pathlib import Path

import httpx
import pytest
from served import Served, served
from tiny_models import picture

pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
pytestmark = pytest.mark.slow

MAX_QUEUE = 8


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


def test_it_listens_on_this_machine_only(page):
    assert "D-AR: fruit64" in httpx.get(page.url).text
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", page.port)) != 0, "0.0.0.0 would answer on this address, too"


def test_an_upload_above_the_limit_is_cut_off(page, tmp_path):
    (tmp_path / "far above.png").write_bytes(bytes(11_000_000))
    with (tmp_path / "far above.png").open("rb") as content:
        answer = httpx.post(f"{page.url}/gradio_api/upload", files={"files": content}, timeout=60)
    assert answer.status_code == 413
    assert answer.text == f"File size exceeded maximum allowed size of {10 * 2**20} bytes."
    assert not list(page.files.rglob("*far above*"))


def test_a_service_manager_ends_it_although_drawings_wait(tmp_path):
    with served(tmp_path) as page:
        picture(0).save(tmp_path / "photo.png")
        with Path(tmp_path / "photo.png").open("rb") as content:
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
