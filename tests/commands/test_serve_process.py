"""`dar serve` as a person starts it: on this machine only, behind a proxy, with limits, and it ends when asked to."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from tiny_models import picture

from benchmarks.serve import visit
from dar_lightning.files import SHIPPED

pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
MAX_QUEUE = 8


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=20).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)


def upload(url: str, path: Path) -> httpx.Response:
    with path.open("rb") as content:
        return httpx.post(f"{url}/gradio_api/upload", files={"files": content}, timeout=60)


@contextmanager
def proxy(upstream: str):
    """Shows a server under /dar, as nginx with `location /dar/` and X-Forwarded-Host does; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {"X-Forwarded-Host": self.headers["Host"], "Accept-Encoding": "identity"}
            headers |= {name: self.headers[name] for name in ("Content-Type",) if name in self.headers}
            assert self.path.startswith("/dar/"), "a link that misses the path"
            url = upstream + self.path.removeprefix("/dar")
            with httpx.stream(self.command, url, headers=headers, content=body, timeout=60) as answer:
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
                self.end_headers()
                for chunk in answer.iter_raw():
                    self.wfile.write(chunk)

        do_GET = do_POST = pass_on

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dar"
    finally:
        server.shutdown()
        server.server_close()


def ask_for_drawings(url: str, visitors: int) -> list[httpx.Response]:
    functions = httpx.get(f"{url}/config").json()["dependencies"]
    (number,) = [function["id"] for function in functions if function["api_name"] == "draw"]
    requests = [
        {"fn_index": number, "session_hash": f"visitor{seed}", "data": [1, seed, 3, None, 0, ""]}
        for seed in range(visitors)
    ]
    return [httpx.post(f"{url}/gradio_api/queue/join", json=request, timeout=60) for request in requests]


@pytest.mark.slow
def test_a_proxy_its_limits_and_that_a_service_manager_ends_it_although_drawings_wait(tmp_path):
    pipeline = tmp_path / "secret" / "mine"
    shutil.copytree(SHIPPED / "fruit64", pipeline)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log, files = f"http://127.0.0.1:{port}", tmp_path / "log", tmp_path / "files"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dar_lightning", "serve", f"--pipeline={pipeline}"),
                *(f"--port={port}", f"--max_queue={MAX_QUEUE}", "--root_path=/dar/"),
            ],
            env=os.environ | {"GRADIO_TEMP_DIR": str(files), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: process.poll() is not None or answers(url))
        assert process.poll() is None, log.read_text()
        assert "D-AR: mine" in httpx.get(url).text
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", port)) != 0, "0.0.0.0 would answer on this address, too"

        with proxy(url) as address:
            assert httpx.get(f"{address}/config").json()["root"] == address
            seen = visit(address, 0)
            assert (seen.failure, seen.previews) == ("", 8)
            file = re.search(rf'"({re.escape(address)}/gradio_api/file=[^"]*)"', seen.received)[1]
            assert httpx.get(file).headers["Content-Type"] == "image/png"
            texts = [httpx.get(f"{address}/{name}").text for name in ("", "config", "gradio_api/info")]
            assert not [text for text in [*texts, seen.received] if "secret" in text], "a path of the server"
            assert "--pipeline mine" in seen.received

        (tmp_path / "far above.png").write_bytes(bytes(11_000_000))
        answer = upload(url, tmp_path / "far above.png")
        assert answer.status_code == 413
        assert answer.text == f"File size exceeded maximum allowed size of {10 * 2**20} bytes."
        assert not list(files.rglob("*far above*"))
        with socket.create_connection(("127.0.0.1", port)) as large:
            large.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            assert large.recv(12) == b"HTTP/1.1 413"
        picture(0).save(tmp_path / "photo.png")
        upload(url, tmp_path / "photo.png").raise_for_status()
        assert list(files.rglob("photo.png"))

        requests = ask_for_drawings(url, 20)
        refused = [answer for answer in requests if answer.status_code != 200]
        # those that wait, and the few that have been drawn meanwhile
        assert MAX_QUEUE <= len(requests) - len(refused) <= MAX_QUEUE + 4
        assert all(answer.status_code == 503 and "queue is full" in answer.text.lower() for answer in refused)

        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in log.read_text()
        assert not [path for path in files.rglob("*") if path.is_file()], "what visitors gave is gone"
    finally:
        process.kill()
        process.wait()
