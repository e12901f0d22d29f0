"""Where the official tokenizer surprises or fails, and what ours does.

Groups' training mass and integer windows are in test_schedule.py; short codes, random numbers and sizes in
test_properties.py.
"""

import pytest
import torch
import torch.nn.functional as F

from dar_lightning.errors import UserError
from dar_lightning.metrics.codebook import CodebookUse
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return SequentialDiffusionTokenizer(TokenizerConfig.preset("tiny"))


@pytest.fixture(scope="module")
def with_repa():
    torch.manual_seed(0)
    config = TokenizerConfig(**(TokenizerConfig.preset("tiny").to_dict() | {"repa_layer": 1, "decoder_patch_size": 4}))
    return SequentialDiffusionTokenizer(config)


def codes(length: int = 32) -> torch.Tensor:
    return torch.arange(length)[None] % 64


@pytest.mark.parametrize("length", [8, 16, 24, 32])
def test_any_whole_number_of_groups_is_decoded(tokenizer, length):
    assert tokenizer.detokenize(codes(length)).shape == (1, 3, 64, 64)
    assert tokenizer.previews(codes(length)).shape == (1, length // 8, 3, 64, 64)


@pytest.mark.parametrize("length", [0, 1, 7, 9, 31, 33, 64])
def test_other_lengths_are_an_error(tokenizer, length):
    with pytest.raises(UserError, match=r"groups of 8|at most 32"):
        tokenizer.detokenize(codes(length))


@pytest.mark.parametrize("groups", [0, -1, 5, 100])
def test_a_preview_that_does_not_exist_is_an_error(tokenizer, groups):
    with pytest.raises(UserError, match="from 1 to 4 groups"):
        tokenizer.detokenize(codes(), groups=groups)


def test_a_preview_of_tokens_that_are_not_there_is_an_error(tokenizer):
    with pytest.raises(UserError, match="3 groups need 24 tokens: the codes hold 16"):
        tokenizer.detokenize(codes(16), groups=3)


@pytest.mark.parametrize("steps", [0, -2])
def test_no_steps_are_an_error(tokenizer, steps):
    with pytest.raises(UserError, match="num_steps"):
        tokenizer.detokenize(codes(), num_steps=steps)


def test_codes_of_another_kind_are_an_error(tokenizer):
    for wrong in (codes().float(), codes()[0]):
        with pytest.raises(UserError, match="need integers"):
            tokenizer.condition(wrong)


def test_size_follows_the_config_or_the_noise(tokenizer):
    assert tokenizer.detokenize(codes()).shape[-2:] == (64, 64)
    assert tokenizer.detokenize(codes(), torch.randn(1, 3, 32, 48)).shape[-2:] == (32, 48)
    assert tokenizer.tokenize(torch.zeros(1, 3, 32, 32)).dtype == torch.int64


# ---- REPA


@pytest.mark.parametrize("side", [16, 32, 80, 128])
def test_repa_follows_the_grid_of_its_teacher(with_repa, side):
    """Also on grids below 16 (official: fails) and on 20 x 20 (official: stays unpooled)."""
    hidden = with_repa.training_losses(torch.zeros(1, 3, side, side))["hidden"]
    assert hidden.shape[-2:] == (side // 4, side // 4)
    assert with_repa.decoder.project_hidden(hidden, (16, 16)).shape == (1, 256, 768)


def test_repa_pools_as_the_official_code_where_that_works(with_repa):
    hidden = torch.randn(1, 64, 32, 32)
    pooled = F.avg_pool2d(hidden, 2).flatten(2).transpose(1, 2)
    ours = with_repa.decoder.project_hidden(hidden, (16, 16))
    assert torch.allclose(ours, with_repa.decoder.repa_head(pooled), atol=1e-6)


def test_repa_head_runs_in_training_only(with_repa):
    runs = []
    handle = with_repa.decoder.repa_head.register_forward_hook(lambda *_: runs.append(1))
    with_repa.previews(codes(), torch.randn(1, 3, 16, 16))
    list(with_repa.stream([codes()], torch.randn(1, 3, 16, 16)))
    with_repa.tokenize(torch.zeros(1, 3, 16, 16))
    handle.remove()
    assert not runs


# ---- codebook statistics


def test_codebook_usage_needs_no_gradient_and_training_runs_on_the_cpu(tokenizer):
    use = CodebookUse(64)
    assert not any(buffer.requires_grad for buffer in use.buffers())
    losses = tokenizer.training_losses(torch.randn(2, 3, 64, 64))
    use.update(losses["codes"])
    (losses["flow"] + losses["vq"] + losses["commit"]).backward()
    use.update(losses["codes"])
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not list(tokenizer.buffers()), "statistics are no part of the model"
