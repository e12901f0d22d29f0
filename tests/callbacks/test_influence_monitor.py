"""TokenInfluence in validation against decoding image by image; on two real processes it pools both ranks' images."""

import copy

import numpy as np
import pytest
import torch
from event_file import scalars, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from test_monitors import make_module
from test_monitors_two_ranks import start
from tiny_models import GROUPS, SIZE, TOKENS, make_tokenizer, picture, write_images

from dar_lightning.callbacks import TokenInfluence
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers


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
            psnr = 10 * np.log10(255**2 / np.square(one - two).mean())
            found.setdefault(f"val/psnr_{name}", []).append(psnr)
    return {name: float(np.mean(values)) for name, values in found.items()}


class Keep(Callback):
    def on_validation_epoch_start(self, trainer, pl_module):  # after EMA has put its weights there
        self.validated = copy.deepcopy(pl_module.tokenizer)


def test_validation(images, tmp_path):
    """Of the averaged weights, on the first four of the seven validation images."""
    keep = Keep()
    callbacks = [EMAWeightAveraging(decay=0.5, use_buffers=False), keep, TokenInfluence(num_images=4)]
    fit = trainer(tmp_path, callbacks, max_steps=3, val_check_interval=3)
    module = make_module()
    fit.fit(module, datamodule=ImageNetDataModule(*images, image_size=SIZE, batch_size=5))
    logged = {name: values for name, values in scalars(tmp_path).items() if name.startswith("val/psnr")}
    expected = by_hand(keep.validated, [0, 1, 2, 3])
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        assert list(logged[name].values()) == pytest.approx([value], abs=0.02), name
    trained = by_hand(module.tokenizer, [0, 1, 2, 3])
    assert abs(trained["val/psnr_same_tokens"] - expected["val/psnr_same_tokens"]) > 0.02


def test_nothing_is_measured_while_the_codebook_is_bypassed(images, tmp_path):
    module = make_module()
    module.tokenizer.quantizer.bypass = True
    fit = trainer(tmp_path, [TokenInfluence()], max_steps=1)
    found = fit.validate(module, datamodule=ImageNetDataModule(*images, image_size=SIZE, batch_size=4), verbose=False)
    assert "val/flow" in found[0]
    assert not [name for name in found[0] if "psnr" in name]


def test_one_image_has_no_other():
    with pytest.raises(UserError, match="num_images is 1: another image's tokens need 2 or more"):
        TokenInfluence(num_images=1)


RANKS = """
import sys
from event_file import trainer
from test_monitors import make_module
from tiny_models import SIZE
from dar_lightning.callbacks import TokenInfluence
from dar_lightning.data.imagenet import ImageNetDataModule

val, out = sys.argv[1:]
fit = trainer(out, [TokenInfluence()], devices=2, strategy="ddp")
data = ImageNetDataModule(val=val, image_size=SIZE, batch_size=3)
fit.validate(make_module(), datamodule=data, verbose=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 3])
def test_both_ranks_images_count(count, tmp_path):
    """Ranks take turns: of five images, one rank has three; of three, one rank has a single one, which says nothing."""
    assert start(tmp_path, RANKS, write_images(tmp_path / "val", count), tmp_path).wait(timeout=300) == 0
    logged = {name: values for name, values in scalars(tmp_path).items() if name.startswith("val/psnr")}
    one, two = by_hand(make_tokenizer(), [*range(0, count, 2)]), None
    if count == 5:
        two = by_hand(make_tokenizer(), [1, 3])
    expected = {name: value if two is None else (3 * value + 2 * two[name]) / 5 for name, value in one.items()}
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        assert list(logged[name].values()) == pytest.approx([value], abs=0.02), name
