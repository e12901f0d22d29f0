"""Load test of `dar serve`: visitors who all ask for a picture at once; failures, waiting times, memory.

A visitor speaks Gradio's protocol as the page does: joins the queue, then reads the stream of events. Rounds of
visitors follow each other, and the server's memory is read after each, so that growth shows.

    python benchmarks/serve.py [--pipeline fruit64] [--visitors 50] [--rounds 2] [--output FILE.json]
"""

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

import httpx

from benchmarks.machine import RESULTS, ROOT, child_environment, options, record
from benchmarks.soak import held

START, PATIENCE = 120, 600  # seconds: for the server to begin, and of a visitor


@dataclass
class Visit:
    """What one visitor saw."""

    queued: list[tuple[int, int]] = field(default_factory=list)  # place in the queue and its length, as they were told
    previews: int = 0
    first: float = 0.0  # seconds to the first preview
    seconds: float = 0.0  # to the end
    failure: str = "no end"  # nothing for a picture that was drawn
    received: str = ""  # all of it


def visit(url: str, seed: int, photo: str | None = None, leave_after: int | None = None) -> Visit:
    """Draw a picture of class 1 as the page of this address does.

    Args:
        url: of the page.
        seed: of the picture.
        photo: an uploaded file, as the server called it, to keep two tokens of.
        leave_after: close the connection, as a tab that is closed does, after so many previews; 0: while waiting.
    """
    seen, start = Visit(), time.perf_counter()
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        functions = client.get("/config").json()["dependencies"]
        (number,) = [function["id"] for function in functions if function["api_name"] == "draw"]
        session = {"session_hash": uuid4().hex}
        asked = {
            "fn_index": number,
            "data": [1, seed, 3, photo and {"path": photo, "meta": {"_type": "gradio.FileData"}}, 2, ""],
        } | session
        if (answer := client.post("/gradio_api/queue/join", json=asked)).status_code != 200:
            seen.failure = answer.text
            return seen
        with client.stream("GET", "/gradio_api/queue/data", params=session) as stream:
            for line in stream.iter_lines():
                seen.received += line
                event = json.loads(line.removeprefix("data:") or "{}")
                seen.seconds = time.perf_counter() - start
                match event.get("msg"):
                    case "estimation":
                        seen.queued.append((event["rank"] + 1, event["queue_size"]))
                    case "process_generating":
                        seen.previews += 1
                        seen.first = seen.first or seen.seconds
                    case "process_completed":
                        seen.failure = "" if event["success"] else str(event["output"])
                        return seen
                if seen.previews == leave_after:
                    return seen
    return seen


def rows(pipeline: str, visitors: int, rounds: int) -> Iterator[dict]:
    """A round of visitors a row, of one server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{(port := free.getsockname()[1])}"
    words = [f"--pipeline={pipeline}", f"--port={port}", f"--max_queue={visitors}"]
    with tempfile.TemporaryDirectory() as files:
        environment = child_environment() | {"GRADIO_TEMP_DIR": files}
        command = [sys.executable, "-m", "dar_lightning", "serve", *words]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for(url, process)
            yield {"visitors": 0, "server memory, MB": round(held(process.pid)["memory_mb"])}
            for number in range(rounds):
                start = time.perf_counter()
                with ThreadPoolExecutor(visitors) as pool:
                    seen = list(pool.map(partial(visit, url), range(number * visitors, (number + 1) * visitors)))
                seconds = time.perf_counter() - start
                failures = [each.failure for each in seen if each.failure]
                firsts = [each.first for each in seen]
                yield {
                    "visitors": visitors,
                    "failed": len(failures),
                    "failures": sorted(set(failures)),
                    "told their place in the queue": sum(bool(each.queued) for each in seen),
                    "seconds a picture": round(seconds / visitors, 2),
                    "median seconds to the first preview": round(statistics.median(firsts), 1),
                    "longest seconds to the first preview": round(max(firsts), 1),
                    "server memory, MB": round(held(process.pid)["memory_mb"]),
                }
        finally:
            process.terminate()
            process.wait()


def wait_for(url: str, process: subprocess.Popen) -> None:
    """Until the server answers."""
    end = time.monotonic() + START
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise SystemExit(f"dar serve does not answer at {url}")


if __name__ == "__main__":
    default = RESULTS / "serve.json"
    given = options(__doc__, pipeline="fruit64", visitors=50, rounds=2, output=default)
    record(given.output, "load on dar serve", rows(given.pipeline, given.visitors, given.rounds))
