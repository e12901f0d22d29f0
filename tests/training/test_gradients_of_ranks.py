"""Two ranks with batch b learn what one with batch 2b learns: from the same data and noise come the same gradients."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from runs import ar_module, image_data, token_data, tokenizer_module, trainer
from tiny_models import fit_tokenizer

from dar_lightning.cli import main
from dar_lightning.training import FSDP2Strategy
from dar_lightning.training.fsdp import whole
from dar_lightning.training.optim import OptimizerConfig

pytestmark = pytest.mark.slow
BATCH, STEPS = 4, 3
STILL = OptimizerConfig(lr=1e-12)  # Adam's first steps have one size for all gradients, however uncertain their sign


class OneNoise(Callback):
    """Times, noise and dropout are drawn for all ranks' samples from one seed; each rank takes those of its own."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        generator = torch.Generator().manual_seed(trainer.global_step)
        rank, world, rand, randn = trainer.global_rank, trainer.world_size, torch.rand, torch.randn

        def part(draw, shape):
            count, *rest = (shape,) if isinstance(shape, int) else shape
            return draw(count * world, *rest, generator=generator)[rank * count : (rank + 1) * count]

        def dropout(x, p, training, inplace):
            return x * (part(rand, x.shape) >= p) / (1 - p)

        self.patches = [
            patch.object(torch, "rand", lambda shape, **options: part(rand, shape)),
            patch.object(torch, "randn_like", lambda like: part(randn, like.shape)),
            patch.object(F, "dropout", dropout),
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


class InBuckets(Callback):
    """Fails where gradients have memory of their own beside DDP's buckets."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) < len(gradients) / 4


def gradients(model: str, data: tuple[str, str], strategy: str, world: int, out: Path) -> None:
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
    fit = trainer(OneNoise(), found, devices=world, strategy=strategy, max_steps=STEPS, limit_val_batches=0)
    fit.fit(module, datamodule=loader(data, 2 * BATCH // world))
    if fit.is_global_zero:
        torch.save(found.steps, out)


@pytest.mark.parametrize("model", ["tokenizer", "ar"])
def test_gradients(model, images, tokens, two_ranks, tmp_path):
    data = tokens if model == "ar" else images
    gradients(model, data, "auto", 1, tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt")
    assert len(one) == STEPS
    assert all(float(gradient.abs().max()) > 0 for step in one for gradient in step.values())
    for strategy in ["ddp", "fsdp"] if model == "ar" else ["ddp"]:
        two_ranks(gradients, model, data, strategy, 2, tmp_path / "two.pt")
        for expected, step in zip(one, torch.load(tmp_path / "two.pt"), strict=True):
            assert expected.keys() == step.keys()
            largest = max(float(gradient.abs().max()) for gradient in expected.values())
            for name, gradient in expected.items():
                # Of a bias of keys, softmax leaves rounding errors only: its gradient is zero.
                size = max(float(gradient.abs().max()), 1e-4 * largest)
                error = float((step[name] - gradient).abs().max()) / size
                assert error < 1e-5, (strategy, name, error)


def test_eight_gpus_keep_no_second_copy_of_gradients(images, two_ranks, tmp_path):
    """Their layer on two ranks; accumulated gradients too."""
    layer = Path(__file__).parents[2] / "experiments" / "trainer" / "8gpu.yaml"
    words = [*fit_tokenizer(*images, tmp_path), f"--config={layer}", f"--trainer.callbacks+={__name__}.InBuckets"]
    words += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_steps=3"]
    words += ["--trainer.limit_val_batches=0", "--data.init_args.batch_size=2", "--global_batch=8"]
    two_ranks(main, [str(word) for word in words])
