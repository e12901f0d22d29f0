"""What several folders of tests share. Imports of what is slow to import are in functions: xdist's main process, which
runs no tests, reads this file before it starts the others."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pair import Pair

ROOT = Path(__file__).parents[1]

QUIET = ("lightning.pytorch", "lightning.fabric", "torch.distributed")

# What processes that tests start say of options and devices is Lightning's and torch's, not a failure.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"


def pytest_configure():
    for name in QUIET:  # to the screen, not to caplog
        logging.getLogger(name).handlers.clear()


@pytest.fixture(scope="session", autouse=True)
def one_parser():
    """LightningCLI's parser takes seconds to build: once for all runs of a test process."""
    from lightning.pytorch.cli import LightningCLI

    build, built = LightningCLI.setup_parser, {}

    def setup_parser(self, *arguments) -> None:
        if type(self) not in built:
            before = {*vars(self)}
            build(self, *arguments)
            built[type(self)] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(built[type(self)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningCLI, "setup_parser", setup_parser)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Files with slow tests come first, so that no process ends long after the other."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """The server that killable's processes are forked from is up before a loader starts one that has imported less.

    Loaders of tests that run in this process then use it, too. What collecting has made stays to the end: the garbage
    collector need not look at its 800,000 objects whenever a Trainer or a test makes it run.
    """
    if "killable" in sys.modules:
        sys.modules["killable"].start_server()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # triton would complain of objects that are never freed


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> str:
    """The folder of a small random pipeline, not to be written to."""
    from tiny_models import make_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 numbered pictures in three tars with an index, not to be written to."""
    from tiny_shards import write_set

    folder = tmp_path_factory.mktemp("shards")
    write_set(folder)
    return folder


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory) -> str:
    """A file of a random VGG16."""
    from tiny_models import write_vgg

    return str(write_vgg(tmp_path_factory.mktemp("vgg") / "vgg16.pth"))


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Calls a function on two ranks; in the place of what it raised there, a Failure."""
    from pair import Pair

    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture
def at_the_root_with_a_random_teacher(monkeypatch):
    """Configs name their data from there; DINOv2 is not downloaded, and has one block."""
    import timm

    monkeypatch.chdir(ROOT)
    make = timm.create_model
    random = {"pretrained": False, "depth": 1}
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: make(*names, **options | random))
