"""PatchGAN: its losses and gradients by two separate backward passes, and a run with it: resumed, clipped, exported."""

import copy

import pytest
import torch
import torch.nn.functional as F
from runs import image_data, trainer
from tiny_models import TOKENIZER, fit_tokenizer

from dar_lightning.cli import main
from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import TokenizerModule
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.losses.adversarial import PatchDiscriminator
from dar_lightning.training.optim import OptimizerConfig
from dar_lightning.weights.lightning import load_lightning_checkpoint

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
    each = torch.stack([-other(twin[i : i + 1]).mean() for i in range(3)])
    (0.3 * (each * t).mean()).backward()
    torch.testing.assert_close(mine, (each * t).mean())
    torch.testing.assert_close(estimate.grad, twin.grad)


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


def test_an_image_is_judged_alone():
    discriminator = PatchDiscriminator(**SMALL)
    pixels = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(discriminator(pixels)[2:3], discriminator(pixels[2:3]))
    assert list(discriminator.buffers()) == []


@pytest.mark.parametrize("options", [{"depth": 0}, {"channels": 40}, {"start_step": -1}], ids=str)
def test_options_out_of_range(options):
    with pytest.raises(UserError, match=f"^{next(iter(options))} is "):
        AdversarialLoss(**options)


class Recording(TokenizerModule):
    """Keeps the last step's clipped gradient norms."""

    def configure_gradient_clipping(self, *args, **options) -> None:
        super().configure_gradient_clipping(*args, **options)
        self.norms = [
            float(torch.nn.utils.get_total_norm([p.grad for p in part.parameters()]))
            for part in (self.tokenizer, self.adversarial)
        ]


def test_the_tokenizer_feels_it_from_start_step_on_and_gradients_are_clipped_apart(images):
    module = Recording(
        TokenizerConfig(**TOKENIZER), OptimizerConfig(lr=1e-3), adversarial=AdversarialLoss(start_step=2, **SMALL)
    )
    logged = []
    module.log_dict = lambda values, **_: logged.append({name: float(value) for name, value in values.items()})
    before = copy.deepcopy(module.adversarial.state_dict())
    fit = trainer(max_steps=4, gradient_clip_val=1e-3, limit_val_batches=0)
    fit.fit(module, image_data(images))
    for number, values in enumerate(logged):
        parts = values["train/flow"] + values["train/vq"] + values["train/commit"]
        felt = 0.5 * values["train/adversarial"] if number >= 2 else 0.0
        assert values["train/loss"] == pytest.approx(parts + felt, rel=1e-5)
    assert logged[0]["train/discriminator"] == pytest.approx(1.0, abs=0.1), "it knows nothing yet"
    assert module.norms == pytest.approx([1e-3, 1e-3], rel=1e-2)
    kernels = {name: tensor for name, tensor in module.adversarial.state_dict().items() if tensor.ndim == 4}
    assert [name for name, tensor in kernels.items() if torch.equal(before[name], tensor)] == []
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


ON = [
    "--model.init_args.adversarial=dar_lightning.training.losses.AdversarialLoss",
    *(f"--model.init_args.adversarial.{name}={value}" for name, value in (SMALL | {"start_step": 2}).items()),
]


def run(images, folder, steps: int, *more: str) -> dict:
    words = [
        *fit_tokenizer(*images, folder, max_steps=steps, limit_val_batches=1, val_check_interval=2),
        *("--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint", "--ckpt_path=last"),
        "--trainer.callbacks+=dar_lightning.training.callbacks.EMA",
        *more,
    ]
    main([str(word) for word in words])
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_with_it_resumes_exactly_and_exports_the_tokenizer_alone(images, tmp_path, capsys):
    run(images, tmp_path / "resumed", 3, *ON)
    resumed, whole = run(images, tmp_path / "resumed", 6, *ON), run(images, tmp_path / "whole", 6, *ON)
    for key in ("current_model_state", "state_dict"):
        assert any(name.startswith("adversarial.discriminator.") for name in whole[key])
        assert [name for name, tensor in whole[key].items() if not torch.equal(tensor, resumed[key][name])] == []
    moments = [resumed["optimizer_states"][0]["state"], whole["optimizer_states"][0]["state"]]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])
    tokenizer = load_lightning_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert not any("discriminator" in name for name in tokenizer.state_dict())
    # A run without it, and a run with it from one without, are refused in words.
    run(images, tmp_path / "without", 1)
    for folder, words, says in (("whole", [], "adversarial is null"), ("without", ON, "adversarial is set")):
        with pytest.raises(SystemExit, match="2"):
            run(images, tmp_path / folder, 7, *words)
        assert says in capsys.readouterr().err.splitlines()[-1]
