"""PatchGAN: its losses and gradients by two separate backward passes, and in training; tests/training resumes a run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny_training import image_data, tokenizer_module, trainer

from dar_lightning.errors import UserError
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.losses.adversarial import PatchDiscriminator
from dar_lightning.training.optim import OptimizerConfig

SMALL = dict(channels=4, depth=2)


def test_one_backward_pass_gives_each_its_own_gradient():
    """As in the usual form: two optimizers' two passes, the discriminator frozen in the generator's."""
    torch.manual_seed(0)
    loss = AdversarialLoss(t_power=1.0, **SMALL)
    real, fake, t = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32), torch.tensor([0.0, 0.5, 1.0])
    estimate = fake.clone().requires_grad_()
    mine, critic = loss(estimate, real, t)
    (0.3 * mine + critic).backward()

    other = copy.deepcopy(loss.discriminator)
    other.zero_grad()
    by_hand = (F.relu(1 - other(real)).mean() + F.relu(1 + other(fake)).mean()) / 2
    by_hand.backward()
    torch.testing.assert_close(critic, by_hand)
    for parameter, theirs in zip(loss.discriminator.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, theirs.grad)
    other.requires_grad_(False)
    twin = fake.clone().requires_grad_()
    each = torch.stack([-other(twin[i : i + 1]).mean() for i in range(3)])  # an image is judged alone
    (0.3 * (each * t).mean()).backward()
    torch.testing.assert_close(mine, (each * t).mean())
    torch.testing.assert_close(estimate.grad, twin.grad)
    assert list(other.buffers()) == []


def test_what_a_patch_sees():
    """70x70 pixels, as in pix2pix: one logit's gradient reaches no farther."""
    discriminator = PatchDiscriminator(channels=4)
    for layer in discriminator:  # GroupNorm looks at the whole image
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x
    pixels = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(pixels)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    seen = pixels.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("options", [{"depth": 0}, {"channels": 40}, {"start_step": -1}], ids=str)
def test_options_out_of_range(options):
    refused(f"^{next(iter(options))} is ", AdversarialLoss, **options)


def test_the_tokenizer_feels_it_from_start_step_on_and_gradients_are_clipped_apart(images):
    adversarial = AdversarialLoss(start_step=2, **SMALL)
    module = tokenizer_module(optimizer=OptimizerConfig(lr=1e-3), adversarial=adversarial)
    logged = []
    module.log_dict = lambda values, **_: logged.append({name: float(value) for name, value in values.items()})
    before = copy.deepcopy(adversarial.state_dict())
    trainer(max_steps=4, gradient_clip_val=1e-3, limit_val_batches=0).fit(module, image_data(images))
    for number, values in enumerate(logged):
        parts = values["train/flow"] + values["train/vq"] + values["train/commit"]
        felt = 0.5 * values["train/adversarial"] if number >= 2 else 0.0
        assert values["train/loss"] == pytest.approx(parts + felt, rel=1e-5)
    assert logged[0]["train/discriminator"] == pytest.approx(1.0, abs=0.1), "it knows nothing yet"
    for part in (module.tokenizer, adversarial):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-2)
    kernels = {name: tensor for name, tensor in adversarial.state_dict().items() if tensor.ndim == 4}
    assert [name for name, tensor in kernels.items() if torch.equal(before[name], tensor)] == []


def test_a_checkpoint_without_it_is_refused():
    with pytest.raises(UserError, match="adversarial is set and the checkpoint has no discriminator"):
        tokenizer_module(adversarial=AdversarialLoss(**SMALL)).on_load_checkpoint({"state_dict": {}})
