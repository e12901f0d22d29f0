import pytest
from tiny_models import write_images, write_tokens


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> tuple[str, str]:
    """Image shards to train on and to validate."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "train", 22), write_images(root / "val", 7)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> tuple[str, str]:
    """Token shards, likewise."""
    root = tmp_path_factory.mktemp("tokens")
    return write_tokens(root / "train", 22), write_tokens(root / "val", 7)
