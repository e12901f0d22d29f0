"""A step over parts of a batch is one over the whole: on two ranks, with slices, and one part after the other."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from tiny_models import fit_tokenizer
from tiny_training import ar_module, image_data, token_data, tokenizer_module, trainer

from dar_lightning.cli import main
from dar_lightning.training import FSDP2Strategy
from dar_lightning.training.callbacks import EMA, CodebookWarmup, GlobalBatch, Reconstructions
from dar_lightning.training.fsdp import whole
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.training.optim import OptimizerConfig

pytestmark = pytest.mark.slow
BATCH, STEPS = 8, 3
STILL = OptimizerConfig(lr=1e-12)  # Adam's first steps have one size for all gradients, however uncertain their sign


class OneNoise(Callback):
    """Draws times, noise and dropout of a step for all its samples from one seed; each part takes those of its own."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        generator = torch.Generator().manual_seed(trainer.global_step)
        parts = trainer.world_size * trainer.accumulate_grad_batches
        number = trainer.global_rank if trainer.world_size > 1 else batch_idx % parts

        def part(draw, shape):
            count, *rest = (shape,) if isinstance(shape, int) else shape
            return draw(count * parts, *rest, generator=generator)[number * count : (number + 1) * count]

        rand, randn = torch.rand, torch.randn
        self.patches = [
            patch.object(torch, "rand", lambda shape, **options: part(rand, shape)),
            patch.object(torch, "randn_like", lambda like: part(randn, like.shape)),
            patch.object(F, "dropout", lambda x, p, training, inplace: x * (part(rand, x.shape) >= p) / (1 - p)),
        ]
        for one in self.patches:
            one.start()

    def on_train_batch_end(self, *args):
        for one in self.patches:
            one.stop()


class Gradients(Callback):
    """Of every step: name -> gradient, as the optimizer gets it."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.steps.append({name: whole(parameter.grad).clone() for name, parameter in named})


def gradients(model: str, data: tuple[str, str], strategy: str, world: int, parts: int, out: Path) -> None:
    if model == "ar":
        module, loader = ar_module({"class_dropout": 0.5}, optimizer=STILL), token_data
    else:
        module, loader = tokenizer_module(optimizer=STILL), image_data
    torch.manual_seed(world)  # the ranks must agree on rank 0's weights, not on the seed
    weights = torch.Generator().manual_seed(0)
    for parameter in module.parameters():  # no zeros that hide gradients
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=weights)
    found = Gradients()
    strategy = FSDP2Strategy() if strategy == "fsdp" else strategy
    options = dict(devices=world, strategy=strategy, max_steps=STEPS, limit_val_batches=0)
    fit = trainer(GlobalBatch(BATCH), OneNoise(), found, **options)
    fit.fit(module, datamodule=loader(data, BATCH // world // parts))
    if fit.is_global_zero:
        torch.save(found.steps, out)


@pytest.mark.parametrize("model", ["tokenizer", "ar"])
def test_gradients(model, images, tokens, two_ranks, tmp_path):
    data = tokens if model == "ar" else images
    gradients(model, data, "auto", 1, 1, tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt")
    assert len(one) == STEPS
    assert all(float(gradient.abs().max()) > 0 for step in one for gradient in step.values())
    # Not of the tokenizer in parts: the codebook's losses are means over the tokens that a part reads.
    for how in ["ddp", "fsdp", "parts"] if model == "ar" else ["ddp"]:
        if how == "parts":
            gradients(model, data, "auto", 1, 2, tmp_path / "two.pt")
        else:
            two_ranks(gradients, model, data, how, 2, 1, tmp_path / "two.pt")
        for expected, step in zip(one, torch.load(tmp_path / "two.pt"), strict=True):
            assert expected.keys() == step.keys()
            largest = max(float(gradient.abs().max()) for gradient in expected.values())
            for name, gradient in expected.items():
                # Of a bias of keys, softmax leaves rounding errors only: its gradient is zero.
                size = max(float(gradient.abs().max()), 1e-4 * largest)
                error = float((step[name] - gradient).abs().max()) / size
                assert error < 1e-5, (how, name, error)


class InBuckets(Callback):
    """Fails where gradients have memory of their own beside DDP's buckets."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) < len(gradients) / 4


def test_eight_gpus_keep_no_second_copy_of_gradients(images, two_ranks, tmp_path):
    """Their layer on two ranks; accumulated gradients too."""
    layer = Path(__file__).parents[2] / "experiments" / "trainer" / "8gpu.yaml"
    words = [*fit_tokenizer(*images, tmp_path), f"--config={layer}", f"--trainer.callbacks+={__name__}.InBuckets"]
    words += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=3"]
    words += ["--trainer.limit_val_batches=0", "--data.init_args.batch_size=2", "--global_batch=8"]
    two_ranks(main, [str(word) for word in words])


def validated(images, devices: int) -> dict:
    """Of a module one of whose losses depends on nothing but the images."""
    module = tokenizer_module()
    original = module.tokenizer.training_losses
    module.tokenizer.training_losses = lambda images, **options: original(images, **options) | {"vq": images.mean()}
    fit = trainer(Reconstructions(), devices=devices, strategy="ddp" if devices > 1 else "auto")
    return fit.validate(module, datamodule=image_data(images, 3), verbose=False)[0]  # rank 1 ends with padding alone


def test_validation_is_that_of_one_process(images, two_ranks):
    one, two = validated(images, 1), two_ranks(validated, images, 2)
    # Noise and times are drawn per batch, so only what does not depend on them can be the same.
    assert two[0]["val/codebook_use"] == one["val/codebook_use"]
    assert two[0]["val/vq"] == pytest.approx(one["val/vq"], rel=1e-5), "4 images on one rank, 3 on the other"
    assert two[0] == two[1]
    assert all(value == value for value in two[0].values()), two[0]


def trained(images) -> tuple[list, dict]:
    """What all ranks must share, and CodebookWarmup's state."""
    adversarial = AdversarialLoss(start_step=2, channels=4, depth=2)
    module = tokenizer_module({"repa_layer": 0}, adversarial=adversarial)
    warmup, ema = CodebookWarmup(2, 2, revive_every=2, revive_until=6), EMA(0.5)
    fit = trainer(warmup, ema, devices=2, strategy="ddp", max_steps=5, limit_val_batches=0)
    fit.fit(module, datamodule=image_data(images, 3))
    codebook = module.tokenizer.quantizer.codebook
    shared = [codebook.data, *fit.optimizers[0].state[codebook].values(), *adversarial.state_dict().values()]
    shared += ema._average_model.state_dict().values()
    return [tensor.detach().numpy() for tensor in shared], warmup.state_dict()["counts"].numpy()


def test_ranks_share_weights(images, two_ranks):
    (first, counts), (second, other_counts) = two_ranks(trained, images)
    assert all((one == two).all() for one, two in zip(first, second, strict=True))
    assert (counts == other_counts).all()
    assert int(counts.sum()) == 2 * 3 * 8, "both ranks' tokens of step 5"
