from collections.abc import Iterator
from pathlib import Path

import pytest
from pair import Pair
from tiny_shards import write_set


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 numbered pictures in three tars with an index, not to be written to."""
    folder = tmp_path_factory.mktemp("shards")
    write_set(folder)
    return folder


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Calls a function on two ranks."""
    pair = Pair()
    yield pair
    pair.stop()
