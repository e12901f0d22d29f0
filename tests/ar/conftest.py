"""The official implementation's three small AR models, in ours, with their numbers."""

import official
import pytest


@pytest.fixture(scope="session", params=["ar_a", "ar_b", "ar_b_gqa_train"])
def golden(request) -> official.Golden:
    return official.load(request.param)
