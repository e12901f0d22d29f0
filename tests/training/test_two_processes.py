"""Two real processes: no parameter without a gradient, one codebook for all, and validation as on one process."""

import pytest
import torch
from runs import image_data, tokenizer_module, trainer

from dar_lightning.training.callbacks import EMA, CodebookWarmup, Reconstructions
from dar_lightning.training.losses import AdversarialLoss

pytestmark = pytest.mark.slow


def validated(images, devices: int) -> dict:
    """Of a module one of whose losses depends on nothing but the images."""
    module = tokenizer_module()
    original = module.tokenizer.training_losses
    module.tokenizer.training_losses = lambda images, **options: original(images, **options) | {"vq": images.mean()}
    fit = trainer(Reconstructions(), devices=devices, strategy="ddp" if devices > 1 else "auto")
    return fit.validate(module, datamodule=image_data(images, 3), verbose=False)[0]  # rank 1 ends with padding alone


def trained(images) -> tuple[list, dict, list]:
    """What all ranks must share, CodebookWarmup's state, and times and noise that this rank drew for each batch."""
    adversarial = AdversarialLoss(start_step=2, channels=4, depth=2)
    module = tokenizer_module({"repa_layer": 0}, adversarial=adversarial)
    warmup, ema = CodebookWarmup(2, 2, revive_every=2, revive_until=6), EMA(0.5)
    drawn, original = [], module.tokenizer.training_losses

    def spy(images, u=None, noise=None):
        after = torch.Generator().set_state(torch.get_rng_state())
        drawn.extend([tuple(u.tolist()), tuple(torch.randn(4, generator=after).tolist())])
        return original(images, u, noise)

    module.tokenizer.training_losses = spy
    fit = trainer(warmup, ema, devices=2, strategy="ddp", max_steps=5, limit_val_batches=0)
    fit.fit(module, datamodule=image_data(images, 3))
    codebook = module.tokenizer.quantizer.codebook
    shared = [codebook.data, *fit.optimizers[0].state[codebook].values(), *adversarial.state_dict().values()]
    shared += ema._average_model.state_dict().values()
    return [tensor.detach().numpy() for tensor in shared], warmup.state_dict()["counts"].numpy(), drawn


def test_validation_is_that_of_one_process(images, two_ranks):
    one, two = validated(images, 1), two_ranks(validated, images, 2)
    # Noise and times are drawn per batch, so only what does not depend on them can be the same.
    assert two[0]["val/codebook_use"] == one["val/codebook_use"]
    assert two[0]["val/vq"] == pytest.approx(one["val/vq"], rel=1e-5), "4 images on one rank, 3 on the other"
    assert two[0] == two[1]
    assert all(value == value for value in two[0].values()), two[0]


def test_ranks_share_weights_and_draw_for_themselves(images, two_ranks):
    (first, counts, drawn), (second, other_counts, other_drawn) = two_ranks(trained, images)
    assert all((one == two).all() for one, two in zip(first, second, strict=True))
    assert (counts == other_counts).all()
    assert int(counts.sum()) == 2 * 3 * 8, "both ranks' tokens of step 5"
    assert len({*drawn, *other_drawn}) == 2 * 5 * 2
