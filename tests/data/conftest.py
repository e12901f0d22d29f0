from pathlib import Path

import pytest
from tiny_shards import CLASSES, SIZES, sample

from dar_lightning.data.shards import ShardIndex, write_shard


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 numbered pictures in three tars with an index."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = iter(range(sum(SIZES)))
    entries = [
        write_shard(folder / f"{i:06d}.tar", [sample(next(numbers)) for _ in range(size)])
        for i, size in enumerate(SIZES)
    ]
    ShardIndex(folder, tuple(entries), CLASSES).save()
    return folder
