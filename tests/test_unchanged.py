"""Shipped weights and what they draw, as they were before conditions, other backbones and several tokens a pass.

The numbers are of revision 16c6007, which had none of these. In float64 another CPU's rounding changes no token.
"""

import hashlib

import pytest
import torch

from dar_lightning import DARPipeline
from dar_lightning.ar.sampling import generate
from dar_lightning.formats.model_sha256 import model_sha256

LABELS = torch.tensor([8, 13, 5])


@pytest.fixture(scope="module")
def pipe() -> DARPipeline:
    return DARPipeline.from_pretrained("fruit64")


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(3)]


def test_the_shipped_models_are_those_that_protocols_name(pipe):
    """Of weights and config: an option that is added changes no hash while it is off."""
    assert model_sha256(pipe.tokenizer) == "169cc7fb518a62837b9018f02ce7fef954b90b009a6cf3c3e19fca3edeea6ec6"
    assert model_sha256(pipe.ar) == "63a0300e82e7d58258145b4d9fc41bee7d85e348fabf2e1c40f29108a29c4072"


@pytest.mark.parametrize(
    ("options", "first", "sha256"),
    [
        (
            {"guidance": (1.1, 4.0)},
            [188, 622, 788, 472, 400, 290],
            "9c9ae6f6343c81ec297121d0b98bc998273f3b26178260f8dbaa4d25e25ca3ea",
        ),
        (
            {"guidance": 3.0, "temperature": 0.9, "top_k": 100, "top_p": 0.95},
            [711, 622, 788, 98, 442, 389],
            "80acdd4bba695795d540ac895b5f2641d975d3281d482893e3ff335a439c7231",
        ),
    ],
    ids=["ramp", "filters"],
)
def test_their_tokens_of_classes(options, first, sha256):
    ar = DARPipeline.from_pretrained("fruit64").ar.double()
    tokens = generate(ar, LABELS, generator=seeded(), **options)
    assert tokens[0, :6].tolist() == first
    assert hashlib.sha256(tokens.numpy().tobytes()).hexdigest() == sha256


def test_their_picture_and_its_codes(pipe):
    pipe.to(torch.float64)
    images = pipe.generate(LABELS[:1], guidance=3.0, generator=seeded()[:1])
    pixel = torch.tensor([0.6487885, -0.0977639, -0.9500178])
    torch.testing.assert_close(images[0, :, 20, 30], pixel, atol=1e-4, rtol=0)
    codes = pipe.tokenizer.tokenize(images.clamp(-1, 1))
    assert codes[0, :6].tolist() == [789, 702, 460, 549, 705, 623]
