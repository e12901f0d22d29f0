"""TokenInfluence in validation against decoding image by image; on two real processes it pools both ranks' images."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from runs import image_data, scalars, tokenizer_module, trainer
from tiny_models import GROUPS, SIZE, TOKENS, make_tokenizer, picture, write_images

from dar_lightning.errors import UserError
from dar_lightning.training import TokenizerModule
from dar_lightning.training.callbacks import EMA, TokenInfluence
from dar_lightning.training.optim import OptimizerConfig


def pixels(tokenizer, codes: torch.Tensor, noise: torch.Tensor) -> np.ndarray:
    image = tokenizer.detokenize(codes[None], noise[None])[0]
    return ((image.clamp(-1, 1) + 1) * 127.5).round().numpy()


def by_hand(tokenizer, numbers: list[int]) -> dict[str, float]:
    """Means over these pictures, where the next one gives the other tokens; seeds are the numbers."""
    found = {}
    originals = {number: np.array(picture(number), dtype=float).transpose(2, 0, 1) for number in numbers}
    codes = {n: tokenizer.tokenize(torch.tensor(image)[None].float() / 127.5 - 1)[0] for n, image in originals.items()}
    for number, following in zip(numbers, [*numbers[1:], numbers[0]], strict=True):
        generator = torch.Generator().manual_seed(number)
        noise, other_noise = (torch.randn(3, SIZE, SIZE, generator=generator) for _ in range(2))
        own, photo = pixels(tokenizer, codes[number], noise), originals[number]
        exchanged = {}
        for group in (1, 2, 3):
            mixed = codes[number].clone()
            mixed[(group - 1) * TOKENS // GROUPS :] = codes[following][(group - 1) * TOKENS // GROUPS :]
            exchanged[group] = pixels(tokenizer, mixed, noise)
        pairs = {
            "own_tokens": (own, photo),
            "other_tokens": (exchanged[1], photo),
            "same_tokens": (own, pixels(tokenizer, codes[number], other_noise)),
        } | {f"exchanged_from_group_{group}": (own, image) for group, image in exchanged.items()}
        for name, (one, two) in pairs.items():
            error = max(np.square(one - two).sum(), 1)  # identical ones count as if a single value differed by 1
            psnr = 10 * np.log10(255**2 * one.size / error)
            found.setdefault(f"val/psnr_{name}", []).append(psnr)
    return {name: float(np.mean(values)) for name, values in found.items()}


def trained_tokenizer():
    tokenizer = make_tokenizer()
    for parameter in tokenizer.encoder.parameters():
        parameter.data *= 2  # so that images have tokens of their own
    return tokenizer


def make_module() -> TokenizerModule:
    module = tokenizer_module(optimizer=OptimizerConfig(lr=0.02))
    module.tokenizer.load_state_dict(trained_tokenizer().state_dict())
    return module


class Keep(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained = copy.deepcopy(pl_module.tokenizer)

    def on_validation_epoch_start(self, trainer, pl_module):  # after EMA has put its weights there
        self.validated = copy.deepcopy(pl_module.tokenizer)


def test_validation(images, tmp_path):
    """Of the averaged weights, on the first four of the seven validation images."""
    keep = Keep()
    fit = trainer(EMA(0.5), keep, TokenInfluence(num_images=4), folder=tmp_path, max_steps=3, val_check_interval=3)
    fit.fit(make_module(), image_data(images, 5))
    logged = {name: values for name, values in scalars(tmp_path).items() if name.startswith("val/psnr")}
    expected, trained = (by_hand(tokenizer, [0, 1, 2, 3]) for tokenizer in (keep.validated, keep.trained))
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        assert list(logged[name].values()) == pytest.approx([value], abs=0.01), name
    assert abs(trained["val/psnr_same_tokens"] - expected["val/psnr_same_tokens"]) > 0.1


def test_nothing_is_measured_while_the_codebook_is_bypassed(images):
    module = make_module()
    module.tokenizer.quantizer.bypass = True
    found = trainer(TokenInfluence()).validate(module, image_data(images), verbose=False)[0]
    assert "val/flow" in found
    assert not [name for name in found if "psnr" in name]
    with pytest.raises(UserError, match="num_images is 1: another image's tokens need 2 or more"):
        TokenInfluence(num_images=1)


def validated(sets: list[str]) -> list[dict]:
    fits = [trainer(TokenInfluence(), devices=2, strategy="ddp") for _ in sets]
    return [
        fit.validate(make_module(), image_data((None, val), 3), verbose=False)[0]
        for fit, val in zip(fits, sets, strict=True)
    ]


@pytest.mark.slow
def test_both_ranks_images_count(two_ranks, tmp_path):
    """Ranks take turns: of five images, one rank has three; of three, one rank has a single one, which says nothing."""
    sets = [write_images(tmp_path / f"val{count}", count) for count in (5, 3)]
    five, three = two_ranks(validated, sets)[0]
    even, odd = (by_hand(trained_tokenizer(), numbers) for numbers in ([0, 2, 4], [1, 3]))
    for name, value in by_hand(trained_tokenizer(), [0, 2]).items():
        assert five[name] == pytest.approx((3 * even[name] + 2 * odd[name]) / 5, abs=0.01), name
        assert three[name] == pytest.approx(value, abs=0.01), name
