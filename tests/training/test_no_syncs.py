"""A training step reads nothing back from the device, which would wait for it, except where it logs.

That no shape depends on values is seen by test_flops.py, which counts on tensors without data.
"""

import pytest
from lightning.pytorch import Trainer
from tiny_training import ar_module, image_data, token_data, tokenizer_module, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from dar_lightning.training.callbacks import EMA, CodebookMonitor, GlobalBatch, GroupLoss, Memory, OptimizerMonitor

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
    """With clipping, mixed precision, accumulation, activation checkpointing, a schedule, and monitors."""
    monitors = [EMA(), OptimizerMonitor(), Memory(), *([CodebookMonitor(), GroupLoss()] if part == "tokenizer" else [])]
    options = dict(precision="bf16-mixed", gradient_clip_val=1.0, log_every_n_steps=3, limit_val_batches=0)
    fit = trainer(GlobalBatch(4), *monitors, folder=tmp_path, max_steps=4, **options)
    parts = ["encoder", "conditioner", "decoder"]
    tokenizer = (tokenizer_module({"latent_norm": "batch"}, activation_checkpointing=parts), image_data(images, 2))
    with Readings(fit) as readings:
        ar = ar_module(activation_checkpointing=True), token_data(tokens, 2)
        fit.fit(*(tokenizer if part == "tokenizer" else ar))
    # The loader's seed; the log of step 3, some of it before the step is counted; at the end, the average's statistics.
    assert {3} <= readings.steps <= {0, 2, 3, 4}
