"""FSQ and LFQ in the place of the learned codebook, and the registry."""

import sys
from typing import get_args, get_type_hints

import pytest
import torch
from tiny_models import SIZE, make_tokenizer

from dar_lightning import SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.errors import UserError
from dar_lightning.tokenizer.quantizers import QUANTIZERS
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import CodebookWarmup

KINDS = {"fsq": dict(codebook_size=81, codebook_dim=4), "lfq": dict(codebook_size=32, codebook_dim=5)}


@pytest.fixture(params=KINDS)
def tokenizer(request) -> SequentialDiffusionTokenizer:
    pytest.importorskip("vector_quantize_pytorch")
    return make_tokenizer(quantizer=request.param, **KINDS[request.param])


def test_every_name_of_the_config_is_registered():
    assert get_args(get_type_hints(TokenizerConfig)["quantizer"]) == tuple(QUANTIZERS)


def test_codes_are_those_that_training_reads(tokenizer):
    images, size = torch.rand(6, 3, SIZE, SIZE) * 2 - 1, tokenizer.config.codebook_size
    codes = tokenizer.tokenize(images)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) < int(codes.max()) < size
    quantized, indices, *_ = tokenizer.quantizer(tokenizer.encoder(images))
    assert torch.equal(indices, codes)
    assert torch.allclose(quantized, tokenizer.quantizer.lookup(codes), atol=1e-6)
    values = tokenizer.quantizer.lookup(torch.arange(size)[None])[0]
    assert values.unique(dim=0).shape == (size, tokenizer.config.codebook_dim), "every code has values of its own"
    assert {len(channel.unique()) for channel in values.T} == {3 if size == 81 else 2}, "levels"


def test_the_encoder_learns_through_it(tokenizer):
    losses = tokenizer.train().training_losses(torch.rand(4, 3, SIZE, SIZE) * 2 - 1)
    (losses["flow"] + losses["vq"] + losses["commit"]).backward()
    assert tokenizer.encoder.to_latent.weight.grad.abs().sum() > 0
    assert (losses["vq"] != 0) == (tokenizer.config.quantizer == "lfq"), "LFQ has its entropy loss"
    with pytest.raises(UserError, match="CodebookWarmup: quantizer is"):  # nothing to warm up
        CodebookWarmup(warmup_steps=100).setup(None, TokenizerModule(tokenizer.config), "fit")


def test_it_is_saved_without_a_codebook(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = SequentialDiffusionTokenizer.from_pretrained(tmp_path)
    assert not any(name.startswith("quantizer") for name in again.state_dict())
    images, noise = torch.rand(2, 3, SIZE, SIZE), torch.randn(2, 3, SIZE, SIZE)
    codes = tokenizer.tokenize(images)
    assert torch.equal(again.tokenize(images), codes)
    assert torch.equal(again.detokenize(codes, noise), tokenizer.detokenize(codes, noise))


def test_without_the_package_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'dar-lightning\[quantizers\]'"):
        make_tokenizer(quantizer="fsq", **KINDS["fsq"])
