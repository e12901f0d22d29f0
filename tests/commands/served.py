"""`dar serve` in a process of its own, as a person starts it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Served:
    """A page.

    Attributes:
        port: where it listens.
        process: what serves it.
        log: what it has printed.
        files: the folder of uploads and pictures.
    """

    port: int
    process: subprocess.Popen
    log: Path
    files: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Start it with its defaults, on a port that is free, and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, files = folder / "log", folder / "files"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may have been told to ignore it
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dar_lightning", "serve", f"--port={port}"],
            cwd=ROOT,
            env=os.environ | {"GRADIO_TEMP_DIR": str(files), "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    page = Served(port, process, log, files)
    try:
        wait_for(lambda: process.poll() is not None or answers(page.url), 120)
        assert process.poll() is None, log.read_text()
        yield page
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=20) as page:
            return page.status == 200
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.02)
