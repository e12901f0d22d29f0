"""FSQ and LFQ against their formulas."""

import importlib.util
import itertools
from dataclasses import replace

import pytest
import torch

from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.tokenizer.scalar_quantizer import ScalarQuantizer

SMALL = {"image_size": 16, "num_tokens": 8, "num_groups": 4}


def tiny(**changes) -> TokenizerConfig:
    return replace(TokenizerConfig.preset("tiny"), **changes)


@pytest.mark.skipif(importlib.util.find_spec("vector_quantize_pytorch") is None, reason="needs the extra quantizers")
class TestScalarQuantizer:
    def test_lfq_keeps_signs(self):
        module = ScalarQuantizer(tiny(quantizer="lfq", codebook_size=16, codebook_dim=4)).eval()
        latents = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
        codes = module.lookup(module.nearest(latents))
        assert torch.equal(codes.sign(), latents.sign())
        assert codes.abs().unique().numel() == 1

    @pytest.mark.parametrize("levels", [3, 5])
    def test_fsq_rounds_every_channel(self, levels):
        config = tiny(quantizer="fsq", codebook_size=levels**2, codebook_dim=2)
        module = ScalarQuantizer(config).eval()
        latents = 2 * torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
        half = (levels - 1) / 2
        # (L - 1) / 2 * tanh(z), rounded (paper, section 3.1), scaled to [-1, 1]; the library shrinks nothing else
        expected = (half * 1.001 * latents.tanh()).round() / half
        assert torch.allclose(module.lookup(module.nearest(latents)), expected)

    @pytest.mark.parametrize(("name", "size", "dim"), [("fsq", 25, 2), ("fsq", 64, 3), ("lfq", 32, 5)])
    def test_every_index_is_a_code_of_its_own(self, name, size, dim):
        config = tiny(quantizer=name, codebook_size=size, codebook_dim=dim)
        codes = ScalarQuantizer(config).lookup(torch.arange(size)[None])[0]
        assert codes.shape == (size, dim)
        grid = itertools.product(*(codes[:, channel].unique().tolist() for channel in range(dim)))
        assert {*map(tuple, codes.tolist())} == {*grid}

    @pytest.mark.parametrize(("name", "size", "dim"), [("fsq", 25, 2), ("lfq", 16, 4)])
    def test_a_tokenizer_with_it_learns(self, name, size, dim):
        torch.manual_seed(0)
        config = tiny(**SMALL, quantizer=name, codebook_size=size, codebook_dim=dim)
        tokenizer = SequentialDiffusionTokenizer(config)
        for parameter in tokenizer.parameters():  # gates begin at zero, where no gradient comes through
            torch.nn.init.normal_(parameter, std=0.1)
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        losses = tokenizer.training_losses(images)
        (losses["flow"] + losses["vq"] + losses["commit"]).backward()
        assert any(parameter.grad.any() for parameter in tokenizer.encoder.parameters() if parameter.grad is not None)
        assert tokenizer.tokenize(images).max() < size
        assert not any("quantizer" in key for key in tokenizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "rvq"}, "quantizer is 'rvq'"),
        ({"quantizer": "fsq", "codebook_size": 24, "codebook_dim": 2}, "codebook_size is 24: fsq needs"),
        ({"quantizer": "lfq", "codebook_size": 9, "codebook_dim": 2}, "codebook_size is 9: lfq needs 2\\^codebook_dim"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)
