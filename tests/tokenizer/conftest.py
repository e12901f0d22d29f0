"""The official implementation's two small tokenizers, in ours, with their numbers."""

import official
import pytest


@pytest.fixture(scope="session", params=["tokenizer_a", "tokenizer_b"])
def golden(request) -> official.Golden:
    return official.load(request.param)
