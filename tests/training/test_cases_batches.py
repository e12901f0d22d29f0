"""Batches of a DataModule of one's own: pixels that the tokenizer would misread are one line; options on resume."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from refusals import refused
from tiny_models import SIZE
from tiny_training import tokenizer_module, trainer

from dar_lightning.training.callbacks import EarlyStoppingPatience

PIXELS = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (PIXELS / 255, "float32 from 0 to 1: give uint8, or floats from 0 to 255"),
        (PIXELS / 127.5 - 1, "float32 from -1 to 1: give uint8"),
        (PIXELS.double() / 255, "float64 from 0 to 1"),
        (PIXELS[..., :-8], rf"is \(2, 3, {SIZE}, {SIZE - 8}\): need \(B, 3, {SIZE}, {SIZE}\)"),
        (PIXELS[:, :1], r"is \(2, 1, .*need \(B, 3, "),
        (PIXELS.permute(0, 2, 3, 1), "need"),
    ],
)
def test_pixels_that_would_be_misread(pixels, says):
    module = tokenizer_module()
    refused(says, module.training_step, {"image": pixels}, 0)
    refused(says, module.evaluate_batch, {"image": pixels, "valid": torch.ones(2, dtype=torch.bool)}, 0, "val")


def test_floats_of_the_range_of_uint8():
    module = tokenizer_module()
    assert torch.equal(module.read_images(PIXELS.float(), 0), module.read_images(PIXELS, 0))
    assert torch.equal(module.read_images(PIXELS, 0), PIXELS.float() / 127.5 - 1)


def test_patience_is_the_one_of_the_config():
    """Lightning's EarlyStopping takes it from the checkpoint."""
    early, other = EarlyStopping("val/loss", patience=7), EarlyStopping("val/flow", patience=3)
    run = trainer(early, other, EarlyStoppingPatience())
    states = {each.state_key: EarlyStopping(each.monitor, patience=3).state_dict() for each in (early, other)}
    states[early.state_key]["wait_count"] = 2
    EarlyStoppingPatience().on_load_checkpoint(run, None, {"callbacks": states})
    for each in (early, other):
        each.load_state_dict(states[each.state_key])
    assert (early.patience, early.wait_count, other.patience) == (7, 2, 3)
