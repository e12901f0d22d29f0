"""A training step reads nothing back from the device, which would wait for it, except where it logs."""

import pytest
import torch
from lightning.pytorch import Trainer
from tiny_models import AR, SIZE, TOKENIZER, TOKENS
from tiny_training import ar_module, image_data, token_data, tokenizer_module, trainer
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dar_lightning.ar.config import ARConfig
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import ARModule, TokenizerModule
from dar_lightning.training.callbacks import CodebookMonitor, GlobalBatch, GroupLoss, Memory, OptimizerMonitor


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", ["tokenizer", "ar"])
def test_a_step_runs_where_nothing_can_be_read(part, recompute):
    """Tensors without data: every reading, and every shape that depends on values, is an error."""
    with FakeTensorMode():
        if part == "tokenizer":
            parts = ["encoder", "conditioner", "decoder"] if recompute else None
            config = TokenizerConfig(**TOKENIZER | {"latent_norm": "batch"})
            module = TokenizerModule(config, activation_checkpointing=parts)
            batch = {"image": torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)}
        else:
            module = ARModule(ARConfig(**AR), activation_checkpointing=recompute)
            batch = {"codes": torch.zeros(4, TOKENS, dtype=torch.long), "label": torch.zeros(4, dtype=torch.long)}
        loss = module.training_step(batch, 0)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        with pytest.raises(DataDependentOutputException):
            loss.item()


READING = ("_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select", "is_nonzero")


class Readings(TorchDispatchMode):
    """Notes the optimizer steps that are done when something waits for the device."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer, self.steps = trainer, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READING:
            self.steps.add(self.trainer.global_step)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("part", ["tokenizer", "ar"])
def test_the_trainer_reads_only_what_it_logs(part, images, tokens, tmp_path):
    """With clipping, mixed precision, accumulation, the learning rate's schedule, and monitors."""
    monitors = [OptimizerMonitor(), Memory(), *([CodebookMonitor(), GroupLoss()] if part == "tokenizer" else [])]
    options = dict(precision="bf16-mixed", gradient_clip_val=1.0, log_every_n_steps=3, limit_val_batches=0)
    fit = trainer(GlobalBatch(4), *monitors, folder=tmp_path, max_steps=4, **options)
    tokenizer = (tokenizer_module(), image_data(images, 2))
    with Readings(fit) as readings:
        fit.fit(*(tokenizer if part == "tokenizer" else (ar_module(), token_data(tokens, 2))))
    # The loader's seed; the log of step 3, some of it before the step is counted.
    assert {3} <= readings.steps <= {0, 2, 3}
