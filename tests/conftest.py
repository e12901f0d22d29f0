"""What several folders of tests share."""

import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import timm
from pair import Pair
from tiny_models import make_pipeline
from tiny_shards import write_set

ROOT = Path(__file__).parents[1]


def pytest_collection_finish():
    """The server that killable's processes are forked from is up before a loader starts one that has imported less.

    Loaders of tests that run in this process then use it, too.
    """
    if "killable" in sys.modules:
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> str:
    """The folder of a small random pipeline, not to be written to."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 numbered pictures in three tars with an index, not to be written to."""
    folder = tmp_path_factory.mktemp("shards")
    write_set(folder)
    return folder


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Calls a function on two ranks; in the place of what it raised there, a Failure."""
    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture
def at_the_root_with_a_random_teacher(monkeypatch):
    """Configs name their data from there; DINOv2 is not downloaded, and has one block."""
    monkeypatch.chdir(ROOT)
    make = timm.create_model
    random = {"pretrained": False, "depth": 1}
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: make(*names, **options | random))
