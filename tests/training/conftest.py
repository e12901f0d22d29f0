import pytest
from tiny_models import make_tokenizer, write_images, write_tokens

from dar_lightning.training.losses import PerceptualLoss


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> tuple[str, str]:
    """Image shards to train on (5 batches of 4, so that checkpoints fall into the middle of epochs) and to validate."""
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "train", 22), write_images(root / "val", 7)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> tuple[str, str]:
    """Token shards, likewise."""
    root = tmp_path_factory.mktemp("tokens")
    return write_tokens(root / "train", 22), write_tokens(root / "val", 7)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    """The tiny tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def perceptual(vgg_file) -> PerceptualLoss:
    """LPIPS on it, not to be changed."""
    return PerceptualLoss(weights_path=vgg_file)


@pytest.fixture(scope="session")
def two_ranks(pair):
    """Calls a function on two ranks, on which it must not fail; its results."""
    return pair.without_failure
